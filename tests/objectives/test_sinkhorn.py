"""Sinkhorn-Knopp by scaling vectors against the textbook algorithm on the whole matrix."""

from __future__ import annotations

from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets

from .naive import randn
from .naive import sinkhorn as reference


def in_threads(parts: list[tuple[Tensor, Tensor | None]], temperature: float) -> list[Tensor]:
    """Each part is one worker; `reduce` adds up what the workers bring to the same call."""
    num_workers = len(parts)
    barrier, slots, results = Barrier(num_workers, timeout=10), [None] * num_workers, [None] * num_workers

    def work(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(slots).sum(dim=0)
            barrier.wait()
            return total

        logits_NK, weights_N = parts[rank]
        results[rank] = sinkhorn_scaling(logits_NK, temperature, weights_N=weights_N, reduce=reduce)

    threads = [Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def random_logits(num_rows: int = 48, num_prototypes: int = 40, seed: int = 0) -> Tensor:
    return randn(num_rows, num_prototypes, seed=seed)


LOGITS: dict[str, Tensor] = {
    "moderate": random_logits(),
    "±1e4": 1e4 * random_logits(seed=2).sign() + random_logits(),
    "rows of very unlike size": random_logits() * torch.logspace(-3, 4, 48)[:, None],
    "columns of very unlike size": random_logits() + torch.linspace(-1e3, 1e3, 40),
    "duplicate rows": random_logits(6).repeat(8, 1),
    "all rows equal": random_logits(1).expand(48, -1),
    "one masked token": random_logits(1),
    "two prototypes": random_logits(48, 2),
    "more prototypes than rows": random_logits(5, 64),
    "non-contiguous": random_logits(40, 48).T,
    "bfloat16": random_logits().bfloat16(),
}


@pytest.mark.parametrize("case", LOGITS)
def test_adversarial_logits_give_the_textbooks_targets(case: str) -> None:
    """In float64 nothing is lost; in float32 no more than the logits' own rounding, divided by the temperature."""
    logits = LOGITS[case]
    expected = reference(logits, 0.07)
    for x in (logits.double(), logits):
        log_v = sinkhorn_scaling(x, 0.07)
        got = targets(x, 0.07, log_v)
        exact = x.dtype == torch.float64
        assert log_v.isfinite().all()
        assert got.dtype == log_v.dtype == torch.promote_types(x.dtype, torch.float32)
        rounding = logits.abs().max().item() / 0.07 * 2.0**-23
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 if exact else max(2e-5, 2 * rounding))


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_equals_the_textbook_algorithm(temperature: float, num_iterations: int) -> None:
    logits = random_logits()
    log_v = sinkhorn_scaling(logits, temperature, num_iterations=num_iterations)
    expected = reference(logits, temperature, num_iterations)
    np.testing.assert_allclose(targets(logits, temperature, log_v), expected, atol=2e-5)
    assert log_v.dtype == torch.float32


@pytest.mark.parametrize("sizes", [[48], [24, 24], [1, 47], [16, 0, 20, 12], [6] * 8])
def test_any_split_over_workers_gives_the_same_scaling(sizes: list[int]) -> None:
    logits = random_logits()
    scalings = in_threads([(part, None) for part in logits.split(sizes)], 0.07)
    for log_v in scalings:
        np.testing.assert_allclose(targets(logits, 0.07, log_v), reference(logits, 0.07), atol=2e-5)


def test_workers_of_very_different_range_need_no_common_maximum() -> None:
    logits = random_logits() * 0.05
    logits[:24, :20] += 400.0
    logits[24:, 20:] -= 300.0
    for log_v in in_threads([(logits[:24], None), (logits[24:], None)], 0.1):
        np.testing.assert_allclose(targets(logits, 0.1, log_v), reference(logits, 0.1), atol=5e-3)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_huge_logits_do_not_overflow(magnitude: float) -> None:
    # Multiples of 1/64 over 1/16 are exact in float32, so only the scaling itself is rounded.
    logits = (random_logits() * 8).round() / 64 + magnitude
    logits[::2] -= 2 * magnitude
    log_v = sinkhorn_scaling(logits, 0.0625)
    result = targets(logits, 0.0625, log_v)
    assert torch.isfinite(log_v).all()
    np.testing.assert_allclose(result.sum(dim=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(result, reference(logits, 0.0625), atol=0.02)


def test_one_hot_rows_of_1e4_are_assigned_evenly() -> None:
    logits = torch.eye(8).repeat(3, 1) * 1e4
    result = targets(logits, 0.04, sinkhorn_scaling(logits, 0.04))
    torch.testing.assert_close(result, torch.eye(8).repeat(3, 1))


def test_a_collapsed_teacher_still_gives_balanced_targets() -> None:
    logits = random_logits() * 0.1
    logits[:, 3] += 5.0
    result = targets(logits, 0.04, sinkhorn_scaling(logits, 0.04))
    plain = torch.softmax(logits / 0.04, dim=1)
    assert plain.mean(dim=0).max() > 0.99
    assert result.mean(dim=0).max() < 2.5 / logits.shape[1]


def test_weights_leave_rows_out_or_repeat_them() -> None:
    logits = random_logits()
    weights = torch.ones(48)
    weights[10:20] = 0
    weights[30] = 2
    effective = torch.cat([logits[:10], logits[20:], logits[30:31]])
    got = targets(effective, 0.07, sinkhorn_scaling(logits, 0.07, weights_N=weights))
    np.testing.assert_allclose(got, reference(effective, 0.07), atol=2e-5)


def test_a_worker_of_padding_only_changes_nothing() -> None:
    logits = random_logits()
    scalings = in_threads([(logits, None), (random_logits(seed=1) + 50, torch.zeros(48))], 0.07)
    for log_v in scalings:
        np.testing.assert_allclose(targets(logits, 0.07, log_v), reference(logits, 0.07), atol=2e-5)


def test_no_masked_token_anywhere_is_finite() -> None:
    assert torch.isfinite(sinkhorn_scaling(torch.empty(0, 7), 0.07)).all()


def test_low_precision_autocast_does_not_reach_the_scaling() -> None:
    logits = random_logits()
    expected = sinkhorn_scaling(logits, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sinkhorn_scaling(logits, 0.07), expected, rtol=0, atol=0)


def test_logits_are_left_unchanged() -> None:
    logits = random_logits()
    before = logits.clone()
    sinkhorn_scaling(logits, 1.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("temperature", "num_iterations"), [(0.0, 3), (-1.0, 3), (0.1, 0)])
def test_impossible_arguments_are_refused(temperature: float, num_iterations: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        sinkhorn_scaling(random_logits(), temperature, num_iterations=num_iterations)
