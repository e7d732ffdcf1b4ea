from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.special import logsumexp
from torch import Tensor

import orchestrator
from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets


def reference(logits_NK: Tensor, temperature: float, num_iterations: int = 3) -> np.ndarray:
    """Textbook Sinkhorn-Knopp on the whole matrix, in log space and float64."""
    log_q = logits_NK.double().numpy() / temperature
    for _ in range(num_iterations):
        log_q = log_q - logsumexp(log_q, axis=0, keepdims=True)
        log_q = log_q - logsumexp(log_q, axis=1, keepdims=True)
    return np.exp(log_q)


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
    return torch.randn(num_rows, num_prototypes, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.timeout(60)
def test_two_gloo_processes_agree_with_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(orchestrator.__file__).parents[1])}
    with subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=environment) as other:
        _work_over_gloo(tmp_path, rank=0)
    assert other.returncode == 0
    first, second = (np.load(tmp_path / f"{rank}.npy") for rank in range(2))
    np.testing.assert_array_equal(first, second)
    logits = random_logits()
    got = targets(logits, 0.07, torch.from_numpy(first))
    np.testing.assert_allclose(got, reference(logits, 0.07), atol=2e-5)


def _work_over_gloo(folder: Path, rank: int) -> None:
    meeting, patience = f"file://{folder}/rendezvous", timedelta(seconds=40)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)

    def reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    part = random_logits().split([20, 28])[rank]
    np.save(folder / f"{rank}.npy", sinkhorn_scaling(part, 0.07, reduce=reduce).numpy())
    dist.destroy_process_group()


if __name__ == "__main__":
    _work_over_gloo(Path(sys.argv[1]), rank=1)
