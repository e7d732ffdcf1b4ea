"""Gram anchoring against the definition, entry by entry, whichever form computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from orchestrator.objectives import gram
from orchestrator.objectives.gram import gram_loss

from . import naive
from .naive import randn

# Two images of nine patches each, but for the last two.
PATCHES: dict[str, tuple[Tensor, Tensor]] = {
    "moderate": (randn(2, 9, 6), randn(2, 9, 6, seed=1)),
    "more patches than features": (randn(2, 9, 3), randn(2, 9, 3, seed=1)),
    "1e4": (1e4 * randn(2, 9, 6), 1e-4 * randn(2, 9, 6, seed=1)),
    "an outlying channel": (randn(2, 9, 6) + 1e4 * torch.eye(6)[2], randn(2, 9, 6, seed=1)),
    "duplicate patches": (randn(2, 3, 6).repeat(1, 3, 1), randn(2, 9, 6, seed=1)),
    "all patches equal": (randn(2, 1, 6).repeat(1, 9, 1), randn(2, 1, 6, seed=1).repeat(1, 9, 1)),
    "student is teacher": (randn(2, 9, 6), randn(2, 9, 6)),
    "student is minus teacher": (randn(2, 9, 6), -randn(2, 9, 6)),
    "bfloat16": (randn(2, 9, 6).bfloat16(), randn(2, 9, 6, seed=1).bfloat16()),
    "non-contiguous": (randn(6, 9, 2).permute(2, 1, 0), randn(9, 2, 6, seed=1).transpose(0, 1)),
    "one image": (randn(1, 9, 6), randn(1, 9, 6, seed=1)),
    "one patch": (randn(2, 1, 6), randn(2, 1, 6, seed=1)),
}
FORMS: dict[str, dict[str, Any]] = {
    "P×P": {"form": "patches"},
    "D×D": {"form": "features"},
    "auto": {},
    "clipped": {"clip_negatives": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", PATCHES)
def test_value_and_gradient_equal_the_definition(case: str, form: str) -> None:
    start, target = PATCHES[case]
    for dtype in (start.dtype, torch.float64):
        student = start.to(dtype).requires_grad_()
        reference = student.detach().double().requires_grad_()
        loss = gram_loss(student, target.to(dtype), **FORMS[form])
        (gradient,) = torch.autograd.grad(2.5 * loss, student)
        expected = naive.gram(reference, target, clip=form == "clipped")
        (wanted,) = torch.autograd.grad(2.5 * expected, reference)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        precision = 1e-11 if dtype == torch.float64 else 1e-5
        assert loss.item() == pytest.approx(expected.item(), rel=precision, abs=precision)
        # The gradient is across each patch's own direction, in units of one over its length.
        lengths = reference.detach().norm(dim=-1, keepdim=True)
        precision = 1e-2 if dtype == torch.bfloat16 else precision
        torch.testing.assert_close(
            gradient * lengths, wanted * lengths, rtol=0, atol=precision, check_dtype=False
        )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    student, teacher = randn(2, 7, 3).double().requires_grad_(), randn(2, 7, 3, seed=1).double()
    assert gradcheck(lambda x: gram_loss(x, teacher, **FORMS[form]), student)


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
    expected = naive.gram(student, teacher, clip=True).item()
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
    assert loss.item() == pytest.approx(naive.gram(student, teacher).item(), rel=1e-5)
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
