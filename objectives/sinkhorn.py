"""Sinkhorn-Knopp centring of teacher logits (SwAV, arXiv 2006.09882, section 3.1; DINOv2 and DINOv3).

Sinkhorn-Knopp turns E = exp(logits / temperature) into diag(u) E diag(v). Only the K-vector v couples the
rows, so a worker needs sums of K numbers from its peers and never their rows, and whoever has v and a row's
logits can rebuild that row's targets: softmax(logits / temperature + log v).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from orchestrator.objectives.precision import widened

Reduce = Callable[[Tensor], Tensor]
"""Elementwise sum of a tensor over all workers; every worker gets the same result. May work in place."""

# exp() of anything within ±80 is a normal, finite float32.
_EXPONENT_LIMIT = 80.0
# Neighbouring scales differ by 8, so that 8·log(workers) < 80 for any number of workers below e^10 ≈ 22,000.
_SCALES = tuple(8.0**power for power in range(5, -1, -1))

# Sums are taken in float64, so that rounding the result hides in which order, and on which worker, they were taken. So
# many numbers at a time: a float64 copy of all logits would be twice as large as they are.
_FLOAT64_NUMBERS = 2**23


def identity(tensor: Tensor) -> Tensor:
    """The :data:`Reduce` of a single worker."""
    return tensor


@torch.no_grad()
def sinkhorn_scaling(
    logits_NK: Tensor,
    temperature: float,
    *,
    weights_N: Tensor | None = None,
    reduce: Reduce = identity,
    num_iterations: int = 3,
) -> Tensor:
    """The column scaling that Sinkhorn-Knopp gives to the global batch, in log form.

    Equal to the textbook algorithm (columns, then rows, `num_iterations` times) on all workers' rows
    together, however they are split. No overflow for |logits| / temperature up to 2e6.

    Args:
        logits_NK: this worker's teacher logits; N may differ between workers and may be 0.
        temperature: the teacher temperature, > 0.
        weights_N: how often each row counts: 0 leaves a padded row out, 2 equals the row twice; None is once.
        reduce: sum over workers. Called the same number of times on every worker.
        num_iterations: DINOv3 uses 3.

    Returns:
        log_v_K, float32 (float64 for float64 logits); up to an additive constant, which :func:`targets` does not see.
    """
    check_settings(temperature, num_iterations)
    with torch.autocast(logits_NK.device.type, enabled=False):
        scaled_NK = widened(logits_NK) / temperature
        if weights_N is None:
            weights_N = scaled_NK.new_ones(len(scaled_NK))
        weights_N = weights_N.to(scaled_NK)
        log_sum_K = column_logsumexp(scaled_NK, weights_N)
        log_v_K = -logsumexp_over_workers(log_sum_K, reduce).to(scaled_NK.dtype)
        # The first iteration in log space bounds everything after it: every row of P sums to 1 and every
        # column has an entry of at least 1/(N·K), so the others are plain, safe matrix-vector products.
        probabilities_NK = torch.softmax(scaled_NK.add_(log_v_K), dim=1)
        u_N = weights_N
        v_K = torch.ones_like(log_v_K)
        for _ in range(num_iterations - 1):
            column_sums_K = reduce(column_sums(probabilities_NK, u_N)).to(scaled_NK.dtype)
            v_K = column_sums_K.clamp_min(torch.finfo(v_K.dtype).tiny).reciprocal()
            u_N = weights_N / row_sums(probabilities_NK, v_K)
        return log_v_K + v_K.log()


@torch.no_grad()
def targets(logits_NK: Tensor, temperature: float, log_v_K: Tensor) -> Tensor:
    """Sinkhorn-Knopp targets of some rows, given the scaling of the batch that they belong to.

    Args:
        logits_NK: teacher logits of any of the rows that :func:`sinkhorn_scaling` saw.
        temperature: the same as there.
        log_v_K: its result.

    Returns:
        targets_NK, float32 (float64 for float64 logits); every row sums to 1.
    """
    return torch.softmax(widened(logits_NK) / temperature + log_v_K, dim=-1)


def column_logsumexp(values_NK: Tensor, weights_N: Tensor) -> Tensor:
    """log Σ_n weights_n·exp(values_n), (K,), float64; −∞ where nothing counts."""
    log_sum_K = values_NK.new_full(values_NK.shape[1:], -torch.inf, dtype=torch.float64)
    for rows in _runs(values_NK):
        weighted_nK = values_NK[rows].double() + weights_N[rows].double().log()[:, None]
        log_sum_K = torch.logaddexp(log_sum_K, torch.logsumexp(weighted_nK, dim=0))
    return log_sum_K


def column_sums(values_NK: Tensor, weights_N: Tensor) -> Tensor:
    """Σ_n weights_n·values_n, (K,), float64."""
    sums_K = values_NK.new_zeros(values_NK.shape[1:], dtype=torch.float64)
    for rows in _runs(values_NK):
        sums_K += weights_N[rows].double() @ values_NK[rows].double()
    return sums_K


def row_sums(values_NK: Tensor, weights_K: Tensor) -> Tensor:
    """Σ_k weights_k·values_k, (N,), in the dtype of `values_NK`; a row's sum does not depend on the other rows."""
    weights_K = weights_K.double()
    parts = [values_NK[rows].double() @ weights_K for rows in _runs(values_NK)]
    return torch.cat(parts).to(values_NK.dtype) if parts else values_NK.new_zeros(0)


def _runs(values_NK: Tensor) -> Iterator[slice]:
    count, width = values_NK.shape
    rows = max(1, _FLOAT64_NUMBERS // max(1, width))
    for start in range(0, count, rows):
        yield slice(start, start + rows)


def logsumexp_over_workers(values_K: Tensor, reduce: Reduce) -> Tensor:
    """log Σ_w exp(values_K of worker w) from sums alone, without knowing the maximum.

    s·log Σ exp(x/s) lies between max x and max x + s·log(workers). A coarse scale s fits any x into the range
    of exp and brackets the maximum; each finer scale then works relative to the bracket, and s = 1 is exact.
    """
    center_K = torch.zeros_like(values_K)
    for scale in _SCALES:
        exponents_K = ((values_K - center_K) / scale).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT)
        center_K = center_K + scale * reduce(exponents_K.exp()).log()
    return center_K


def check_settings(temperature: float, num_iterations: int) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, not {num_iterations}")
