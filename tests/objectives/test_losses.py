"""DINO, iBOT, KoLeo and the feature loss against loops in float64, on inputs that would show a mistake."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from orchestrator.objectives.dino import cross_entropy, dino_loss
from orchestrator.objectives.features import feature_loss
from orchestrator.objectives.ibot import ibot_loss
from orchestrator.objectives.koleo import koleo

from . import naive
from .naive import probabilities, randn

# Three views of four images each, but for the last two.
LOGITS: dict[str, Tensor] = {
    "moderate": randn(3, 4, 7),
    "±1e4": 1e4 * randn(3, 4, 7, seed=5).sign() + randn(3, 4, 7),
    "1e4 plus a little": 1e4 + randn(3, 4, 7),
    "sharp": 1e4 * torch.eye(7)[torch.arange(12) % 7].view(3, 4, 7),
    "duplicate rows": randn(3, 1, 7).expand(3, 4, 7),
    "bfloat16": randn(3, 4, 7).bfloat16(),
    "bfloat16 of 1e4": (1e4 * randn(3, 4, 7)).bfloat16(),
    "non-contiguous": randn(7, 4, 3).permute(2, 1, 0),
    "two prototypes": randn(3, 4, 2),
    "one image": randn(3, 1, 7),
}
# Where the tokens of a case with six masked tokens lie.
CROPS_OF_TOKENS = {"mixed": [2, 0, 2, 2, 0, 5], "one crop": [3] * 6, "one each": [5, 4, 3, 2, 1, 0]}


def as_exact(target: Tensor, student: Tensor) -> Tensor:
    """The same float32 targets, in float64 beside a float64 student."""
    return target.to(torch.promote_types(student.dtype, target.dtype))


def check(ours: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Value and gradient in the input's own precision, and again in float64, where nothing may be lost."""
    for student in (x, x.double()):
        exact = student.dtype == torch.float64
        student = student.clone(memory_format=torch.preserve_format).requires_grad_()
        reference = student.detach().double().requires_grad_()
        loss, expected = ours(student), formula(reference)
        (gradient,) = torch.autograd.grad(loss, student)
        (wanted,) = torch.autograd.grad(expected, reference)
        assert loss.dtype == (torch.float64 if exact else torch.float32)
        assert gradient.isfinite().all()
        relative = 1e-9 if exact else 1e-5
        assert loss.item() == pytest.approx(expected.item(), rel=relative, abs=relative)
        if student.dtype == torch.bfloat16:
            relative = 1e-2  # the gradient is rounded to bfloat16
        scale = max(1e-2, wanted.abs().max().item())
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=relative * scale)


@pytest.mark.parametrize("case", LOGITS)
def test_cross_entropy_is_the_definition(case: str) -> None:
    rows = LOGITS[case][0]
    target = probabilities(*rows.shape)
    weights = torch.arange(1.0, len(rows) + 1).double()  # so that rows cannot be mixed up

    def formula(student: Tensor) -> Tensor:
        terms = [naive.cross_entropy(s, t) for s, t in zip(student, target, strict=True)]
        return (weights * torch.stack(terms)).sum()

    check(lambda s: (weights.to(s.dtype) * cross_entropy(s, as_exact(target, s))).sum(), formula, rows)


def test_cross_entropy_keeps_what_tells_large_logits_apart() -> None:
    """A student that agrees with its target at logits of 1e4: the loss is small, and not the rounding of 1e5."""
    student = 1e4 + torch.tensor([[0.0, 0.25, 0.5]])
    target = torch.softmax((student.double() - 1e4) / 0.1, dim=-1)
    expected = naive.cross_entropy(student[0], target[0]).item()
    assert cross_entropy(student, target.float()).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_targets_that_do_not_sum_to_one() -> None:
    student, target = randn(4, 6), 3 * probabilities(4, 6)
    expected = torch.stack([naive.cross_entropy(s, t) for s, t in zip(student, target, strict=True)])
    torch.testing.assert_close(cross_entropy(student, target).double(), expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_keeps_one_copy_of_the_logits_for_the_backward_pass() -> None:
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (64, 500):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    student, target = randn(64, 500).requires_grad_(), probabilities(64, 500)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(student, target)
    assert len(kept - {target.untyped_storage().data_ptr()}) == 1


@pytest.mark.parametrize("skip_same", [True, False])
@pytest.mark.parametrize("case", LOGITS)
def test_dino_is_the_mean_over_pairs(case: str, skip_same: bool) -> None:
    student = LOGITS[case]
    target = probabilities(2, *student.shape[1:])
    check(
        lambda s: dino_loss(s, as_exact(target, s), skip_same),
        lambda s: naive.dino(s, target, skip_same),
        student,
    )


@pytest.mark.parametrize("skip_same", [True, False])
@pytest.mark.parametrize(("num_views", "num_targets"), [(2, 2), (8, 2), (3, 4), (1, 2)])
def test_dino_counts_its_pairs(num_views: int, num_targets: int, skip_same: bool) -> None:
    student, target = randn(num_views, 3, 5), probabilities(num_targets, 3, 5)
    check(
        lambda s: dino_loss(s, as_exact(target, s), skip_same),
        lambda s: naive.dino(s, target, skip_same),
        student,
    )


def test_dino_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no pair"):
        dino_loss(randn(1, 2, 5), probabilities(1, 2, 5))


@pytest.mark.parametrize("crops", CROPS_OF_TOKENS)
@pytest.mark.parametrize("case", LOGITS)
def test_ibot_averages_within_each_crop_and_divides_by_all_crops(case: str, crops: str) -> None:
    student = LOGITS[case].flatten(0, 1)[:6]
    target = probabilities(*student.shape)
    image_of = torch.tensor(CROPS_OF_TOKENS[crops][: len(student)])
    check(
        lambda s: ibot_loss(s, as_exact(target, s), image_of, 8),
        lambda s: naive.ibot(s, target, image_of, 8),
        student,
    )


def test_ibot_of_one_masked_token() -> None:
    student, target = randn(1, 5), probabilities(1, 5)
    loss = ibot_loss(student, target, torch.tensor([3]), 4)
    assert loss.item() == pytest.approx(naive.cross_entropy(student[0], target[0]).item() / 4, rel=1e-6)


def test_ibot_without_masked_tokens_is_zero_and_has_a_gradient() -> None:
    student = torch.empty(0, 5, requires_grad=True)
    loss = ibot_loss(student, torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 4)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None


ROWS: dict[str, Tensor] = {
    "moderate": randn(12, 6),
    "last group short": randn(39, 6),
    "alone in the last group": randn(17, 6),
    "two": randn(2, 6),
    "one": randn(1, 6),
    "duplicates": randn(6, 6).repeat(2, 1),
    "all equal": randn(1, 6).repeat(5, 1),
    "opposite": torch.cat([randn(3, 6), -randn(3, 6)]),
    "one dimension": torch.tensor([[1.0], [2.0], [-3.0]]),
    "very long and very short": randn(8, 6) * torch.tensor([1e15, 1e-5]).repeat(4)[:, None],
    "bfloat16": randn(12, 6).bfloat16(),
    "non-contiguous": randn(6, 12).T,
}


@pytest.mark.parametrize("case", ROWS)
def test_koleo_is_minus_the_mean_log_distance_to_the_nearest_in_the_group(case: str) -> None:
    check(koleo, naive.koleo, ROWS[case])


def test_koleo_of_duplicates_is_the_logarithm_of_eps_and_pushes_nowhere() -> None:
    rows = randn(1, 6).repeat(4, 1).requires_grad_()
    loss = koleo(rows)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-6)
    assert torch.equal(rows.grad, torch.zeros(4, 6))


def test_koleo_of_almost_equal_rows_is_finite() -> None:
    for gap in (1e-3, 1e-5, 1e-7, 1e-9):
        rows = (randn(1, 64) + gap * randn(16, 64, seed=1)).requires_grad_()
        loss = koleo(rows)
        loss.backward()
        assert loss.isfinite(), gap
        assert rows.grad.isfinite().all(), gap


def test_koleo_descent_spreads_the_features() -> None:
    rows = (randn(16, 3) * 0.1 + torch.tensor([1.0, 0.0, 0.0])).requires_grad_()
    start = koleo(rows).item()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(koleo(rows), rows)
        rows = (rows - 0.02 * gradient).detach().requires_grad_()
    assert koleo(rows).item() < start - 1.0


def test_koleo_finds_the_same_neighbours_under_autocast() -> None:
    # Neighbours this close are told apart in float32 only.
    rows = randn(1, 64) + 0.01 * randn(16, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = koleo(rows)
    assert torch.equal(low, koleo(rows))


@pytest.mark.parametrize("cosine_weight", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    "case", ["moderate", "two", "one", "duplicates", "one dimension", "bfloat16", "non-contiguous", "large"]
)
def test_feature_loss_is_cosine_plus_smooth_l1(case: str, cosine_weight: float) -> None:
    student = 1e4 * randn(5, 6) if case == "large" else ROWS[case]
    teacher = randn(*student.shape, seed=1)
    check(
        lambda s: feature_loss(s, as_exact(teacher, s), cosine_weight),
        lambda s: naive.features(s, teacher, cosine_weight),
        student,
    )


def test_feature_loss_of_equal_features_is_zero_and_the_teacher_gets_no_gradient() -> None:
    student, teacher = randn(4, 6).requires_grad_(), randn(4, 6, seed=1).requires_grad_()
    feature_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert feature_loss(student, student).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: cross_entropy(x, probabilities(5, 6).double()),
        lambda x: dino_loss(x.view(5, 2, 3), probabilities(2, 2, 3).double()),
        lambda x: ibot_loss(x, probabilities(5, 6).double(), torch.tensor([0, 2, 2, 0, 3]), 4),
        lambda x: koleo(x, group_size=3),
        lambda x: feature_loss(x, randn(5, 6, seed=1).double()),
    ],
    ids=["cross entropy", "dino", "ibot", "koleo", "features"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor], Tensor]) -> None:
    assert gradcheck(loss, randn(5, 6).double().requires_grad_())
