"""DINO, iBOT, KoLeo and the feature loss against loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from orchestrator.objectives.dino import cross_entropy, dino_loss
from orchestrator.objectives.features import feature_loss
from orchestrator.objectives.ibot import ibot_loss
from orchestrator.objectives.koleo import koleo


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    return torch.softmax(3 * randn(*shape, seed=seed), dim=-1)


def naive_cross_entropy(student: Tensor, target: Tensor, temperature: float) -> float:
    log_p = torch.log_softmax(student.double() / temperature, dim=-1)
    return -sum(float(t) * float(lp) for t, lp in zip(target, log_p, strict=True))


def test_cross_entropy_equals_the_definition() -> None:
    student, target = randn(5, 7), probabilities(5, 7)
    expected = [naive_cross_entropy(s, t, 0.1) for s, t in zip(student, target, strict=True)]
    torch.testing.assert_close(cross_entropy(student, target), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_cross_entropy_takes_bfloat16_and_large_logits() -> None:
    student = torch.tensor([[3e4, 0.0, -3e4]], dtype=torch.bfloat16)
    loss = cross_entropy(student, torch.tensor([[0.0, 1.0, 0.0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(student[0, 0]) / 0.1, rel=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_target() -> None:
    student, target = randn(4, 6).requires_grad_(), probabilities(4, 6)
    cross_entropy(student, target, 0.1).sum().backward()
    expected = (torch.softmax(student.detach() / 0.1, dim=-1) - target) / 0.1
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("skip_same", [True, False])
@pytest.mark.parametrize(("num_views", "num_targets"), [(2, 2), (8, 2), (3, 4), (1, 2)])
def test_dino_is_the_mean_over_pairs(num_views: int, num_targets: int, skip_same: bool) -> None:
    student, target = randn(num_views, 3, 5), probabilities(num_targets, 3, 5)
    terms = [
        naive_cross_entropy(student[v, b], target[t, b], 0.1)
        for v, t, b in itertools.product(range(num_views), range(num_targets), range(3))
        if not (skip_same and v == t)
    ]
    loss = dino_loss(student, target, skip_same)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_dino_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="no pair"):
        dino_loss(randn(1, 2, 5), probabilities(1, 2, 5))


def test_ibot_averages_within_each_crop_and_divides_by_all_crops() -> None:
    student, target = randn(6, 5), probabilities(6, 5)
    image_of = torch.tensor([2, 0, 2, 2, 0, 5])
    losses = [naive_cross_entropy(s, t, 0.1) for s, t in zip(student, target, strict=True)]
    means = [
        sum(x for x, i in zip(losses, image_of.tolist(), strict=True) if i == c) / image_of.tolist().count(c)
        for c in (0, 2, 5)
    ]
    assert ibot_loss(student, target, image_of, 8).item() == pytest.approx(sum(means) / 8, rel=1e-5)


def test_ibot_without_masked_tokens_is_zero_and_has_a_gradient() -> None:
    student = torch.empty(0, 5, requires_grad=True)
    loss = ibot_loss(student, torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 4)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None


def naive_koleo(rows: Tensor) -> list[float]:
    unit = [r / r.norm() for r in rows.double()]
    nearest = [min(float((a - b).norm()) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    return [-math.log(d + 1e-8) for d in nearest]


@pytest.mark.parametrize("num_rows", [2, 16, 32, 39])
def test_koleo_looks_for_neighbours_inside_groups(num_rows: int) -> None:
    rows = randn(num_rows, 6)
    terms = [x for group in rows.split(16) for x in naive_koleo(group)]
    assert koleo(rows).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_koleo_leaves_out_a_sample_alone_in_its_group() -> None:
    rows = randn(17, 6)
    assert koleo(rows).item() == pytest.approx(koleo(rows[:16]).item(), rel=1e-6)
    assert koleo(rows[:1]).item() == 0.0


def test_koleo_of_duplicates_has_finite_value_and_gradient() -> None:
    rows = randn(1, 6).repeat(4, 1).requires_grad_()
    loss = koleo(rows)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-4)
    assert torch.isfinite(rows.grad).all()


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


def test_feature_loss_is_cosine_plus_smooth_l1() -> None:
    student, teacher = randn(4, 6), randn(4, 6, seed=1)
    s, t = student.double(), teacher.double()
    cosine = sum(1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(s, t, strict=True)) / 4
    gaps = [abs(float(x)) for x in (s - t).flatten()]
    smooth = sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(gaps)
    assert feature_loss(student, teacher).item() == pytest.approx(0.9 * cosine + 0.1 * smooth, rel=1e-5)
    assert feature_loss(student, student).item() == pytest.approx(0.0, abs=1e-6)


def test_feature_loss_gives_the_teacher_no_gradient() -> None:
    student, teacher = randn(4, 6).requires_grad_(), randn(4, 6, seed=1).requires_grad_()
    feature_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
