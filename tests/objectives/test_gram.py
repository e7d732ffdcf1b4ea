from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orchestrator.objectives import gram
from orchestrator.objectives.gram import gram_loss


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(student: Tensor, teacher: Tensor, clip: bool = False) -> Tensor:
    """Entry by entry, in float64; differentiable in the student."""
    entries = []
    for x, y in zip(student.double(), teacher.double(), strict=True):
        for i in range(len(x)):
            for j in range(len(x)):
                a = torch.cosine_similarity(x[i], x[j], dim=0)
                b = torch.cosine_similarity(y[i], y[j], dim=0)
                entries.append(((a.clamp_min(0) - b.clamp_min(0)) if clip else (a - b)) ** 2)
    return torch.stack(entries).mean()


@pytest.mark.parametrize("form", ["patches", "features", "auto"])
@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 9, 3)])
def test_value_and_gradient_equal_the_definition(form: str, shape: tuple[int, int, int]) -> None:
    student, teacher = randn(*shape).requires_grad_(), randn(*shape, seed=1)
    loss = gram_loss(student, teacher, form=form)
    (gradient,) = torch.autograd.grad(2.5 * loss, student)
    expected = naive(student, teacher)
    (expected_gradient,) = torch.autograd.grad(2.5 * expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_features_form_does_not_cancel_when_student_and_teacher_agree() -> None:
    teacher = randn(1, 300, 32)
    student = (teacher + 1e-4 * randn(1, 300, 32, seed=1)).requires_grad_()
    x = torch.nn.functional.normalize(student.double(), dim=-1)
    y = torch.nn.functional.normalize(teacher.double(), dim=-1)
    exact = (x @ x.mT - y @ y.mT).square().mean()
    (exact_gradient,) = torch.autograd.grad(exact, student)
    loss = gram_loss(student, teacher, form="features")
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert (gradient - exact_gradient).norm() < 2e-3 * exact_gradient.norm()


def test_rotated_features_have_no_loss() -> None:
    features = randn(2, 12, 5)
    rotation, _ = torch.linalg.qr(randn(5, 5, seed=2))
    for form in ("patches", "features"):
        assert gram_loss(features @ rotation, features, form=form).item() == pytest.approx(0.0, abs=1e-6)


def test_clipping_ignores_negative_similarities() -> None:
    student, teacher = randn(2, 8, 3), randn(2, 8, 3, seed=1)
    expected = naive(student, teacher, clip=True).item()
    # Eight patches in three dimensions would take the other form if clipping did not forbid it.
    assert gram_loss(student, teacher, clip_negatives=True).item() == pytest.approx(expected, rel=1e-5)
    assert gram_loss(student, teacher).item() != pytest.approx(expected, rel=1e-2)


def test_auto_takes_the_features_form_from_its_threshold_on(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def record(student: Tensor, teacher: Tensor) -> Tensor:
        taken.append(student.shape[1])
        return student.sum()

    monkeypatch.setattr(gram, "_features_form", record)
    for num_patches in (100, 167, 168, 400):
        gram_loss(randn(1, num_patches, 100), randn(1, num_patches, 100))
    assert taken == [168, 400]


def test_teacher_may_have_another_width_and_gets_no_gradient() -> None:
    student, teacher = randn(1, 40, 4).requires_grad_(), randn(1, 40, 6).requires_grad_()
    loss = gram_loss(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(naive(student, teacher).item(), rel=1e-5)
    assert teacher.grad is None


def test_autocast_does_not_lower_the_precision() -> None:
    student, teacher = randn(1, 20, 4), randn(1, 20, 4, seed=1)
    expected = gram_loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_loss(student, teacher), expected)


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="grids differ"):
        gram_loss(randn(1, 4, 3), randn(1, 5, 3))
    with pytest.raises(ValueError, match="P×P"):
        gram_loss(randn(1, 4, 3), randn(1, 4, 3), form="features", clip_negatives=True)
    with pytest.raises(ValueError, match="feature sizes"):
        gram_loss(randn(1, 4, 3), randn(1, 4, 5), form="features")
