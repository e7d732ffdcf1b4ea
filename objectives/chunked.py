"""DINO's and iBOT's cross-entropy and Sinkhorn-Knopp without ever holding the logits of all rows at once.

At 262,144 prototypes one row of float32 logits is a megabyte; the codes that they follow from are a few hundred
numbers. Here rows go through in chunks: the logits of a chunk, the teacher's targets, the loss and the gradients are
made, added up, and dropped before the next chunk.

The gradients are made in the forward pass, not by recomputing logits in the backward pass: at 768 rows and 32,768
prototypes recomputing took 1.45 times as long, and held more at its peak. The price is that the weight of every row
in the sum must be known beforehand, and that the sum can be differentiated once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orchestrator.objectives.precision import work_dtype
from orchestrator.objectives.sinkhorn import (
    Reduce,
    check_settings,
    column_logsumexp,
    column_sums,
    identity,
    logsumexp_over_workers,
    row_sums,
)


@dataclass(frozen=True)
class SoftTargets:
    """Target probabilities as what they can be rebuilt from.

    Attributes:
        codes_TNC: teacher's bottleneck vectors, of T views of N items each.
        prototypes_KC: the teacher's.
        log_v_K: Sinkhorn-Knopp scaling of the batch that the rows belong to.
        temperature: the teacher's.
    """

    codes_TNC: Tensor
    prototypes_KC: Tensor
    log_v_K: Tensor
    temperature: float

    def rebuild(self, items: slice, space: _Space) -> Tensor:
        """Targets (T, n, K) of some items: softmax(logits / temperature + log v)."""
        scaled_TnK = space.logits(self.codes_TNC[:, items], self.prototypes_KC)
        return _softmax_(scaled_TnK.div_(self.temperature).add_(self.log_v_K))


def chunked_cross_entropy(
    codes_RNC: Tensor,
    prototypes_KC: Tensor,
    targets: SoftTargets,
    shares_RT: Sequence[Sequence[float]],
    weights_RN: Tensor,
    *,
    temperature: float = 0.1,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of R student rows of each of N items against mixes of T target rows.

    Row (r, n) learns from Σ_t shares[r, t] · targets[t, n]. DINO's rows are views, of which each learns from the
    teacher's views but its own; iBOT's items are masked tokens, with one row each.

    Args:
        codes_RNC: the student's bottleneck vectors, any float dtype; products are made in it (in the autocast
            dtype where autocast is on), sums and everything else in at least float32.
        prototypes_KC: the student's.
        targets: of the same N items.
        shares_RT: ≥ 0.
        weights_RN: of each row in the sum, or what broadcasts to it.
        temperature: the student's.
        chunk_rows: most rows of student or teacher whose logits are held at once; at least one item's are.

    Returns:
        total: scalar Σ weights · losses; its gradient goes to `codes_RNC` and `prototypes_KC`, and can be taken once.
        losses_RN: for figures; without gradient.

    Raises:
        ValueError: `chunk_rows` below 1, or the numbers of items differ.
    """
    if codes_RNC.shape[1] != targets.codes_TNC.shape[1]:
        raise ValueError(
            f"student rows of {codes_RNC.shape[1]} items, targets of {targets.codes_TNC.shape[1]}"
        )
    step = _items(chunk_rows, max(len(codes_RNC), len(targets.codes_TNC)))
    weights_RN = weights_RN.to(work_dtype(codes_RNC)).expand(codes_RNC.shape[:2])
    total, losses_RN = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        codes_RNC, prototypes_KC, targets, shares_RT, weights_RN, temperature, step
    )
    return total, losses_RN


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        codes_RNC: Tensor,
        prototypes_KC: Tensor,
        targets: SoftTargets,
        shares_RT: Sequence[Sequence[float]],
        weights_RN: Tensor,
        temperature: float,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        num_rows, num_items = codes_RNC.shape[:2]
        step = min(step, num_items)
        codes, prototypes = _low(codes_RNC), _low(prototypes_KC)
        targets = replace(
            targets, codes_TNC=_low(targets.codes_TNC), prototypes_KC=_low(targets.prototypes_KC)
        )
        losses_RN = torch.empty(weights_RN.shape, dtype=weights_RN.dtype, device=weights_RN.device)
        wanted = any(ctx.needs_input_grad[:2])
        sums = _LinearGradients(codes, prototypes) if wanted else None
        space, teacher_space = (_Space(len(one) * step, prototypes) for one in (codes, targets.codes_TNC))
        mixes = _Space(step, prototypes) if num_rows > 1 else teacher_space
        with torch.autocast(codes_RNC.device.type, enabled=False):
            for items in _chunks(num_items, step):
                targets_TnK = targets.rebuild(items, teacher_space)
                logits_RnK = space.logits(codes[:, items], prototypes)
                for row, shares_T in enumerate(shares_RT):
                    mixed_nK = _mix(targets_TnK, shares_T, mixes)
                    weights_n = weights_RN[row, items] if wanted else None
                    losses_RN[row, items] = _row_loss_(
                        logits_RnK[row], mixed_nK, sum(shares_T), temperature, weights_n
                    )
                if sums is not None:
                    sums.add(logits_RnK, items)
            total = (losses_RN * weights_RN).sum()
        if sums is not None:
            ctx.save_for_backward(sums.codes_RNC, sums.prototypes_KC)
        ctx.dtypes = codes_RNC.dtype, prototypes_KC.dtype
        ctx.mark_non_differentiable(losses_RN)
        return total, losses_RN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the prototypes' gradient may be half a gigabyte. Autograd sees the change and
        # refuses to come here again.
        codes_RNC, prototypes_KC = (
            gradient.mul_(grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return codes_RNC, prototypes_KC, None, None, None, None, None


def _mix(targets_TnK: Tensor, shares_T: Sequence[float], space: _Space) -> Tensor:
    """Σ_t shares[t] · targets[t], (n, K); where there is one student row it takes the targets' own place."""
    mixed_nK = torch.mul(targets_TnK[0], shares_T[0], out=space.rows(targets_TnK.shape[1]))
    for target_nK, share in zip(targets_TnK[1:], shares_T[1:], strict=True):
        mixed_nK.add_(target_nK, alpha=share)
    return mixed_nK


def _row_loss_(
    logits_nK: Tensor, target_nK: Tensor, mass: float, temperature: float, weights_n: Tensor | None
) -> Tensor:
    """Cross-entropy (n,); with weights the logits are replaced by the gradient of the weighted sum.

    Targets sum to `mass`. Softmax does not see a shift, but float32 does (`objectives.dino.cross_entropy`).
    """
    scaled_nK = logits_nK.sub_(logits_nK.amax(dim=-1, keepdim=True)).div_(temperature)
    inner_n = torch.bmm(target_nK[:, None], scaled_nK[:, :, None]).flatten()
    exp_nK = scaled_nK.exp_()
    sum_n = exp_nK.sum(dim=-1)
    if weights_n is not None:
        # d loss / d logits = (mass · softmax − targets) / temperature
        scale_n = weights_n / temperature
        exp_nK.mul_((scale_n * mass / sum_n)[:, None]).addcmul_(target_nK, scale_n[:, None], value=-1.0)
    return sum_n.log_().mul_(mass).sub_(inner_n)


class _Space:
    """Room for the logits of a chunk of rows, used again by the next: to ask for it anew costs time, and holes."""

    def __init__(self, rows: int, prototypes_KC: Tensor) -> None:
        self._flat = torch.empty(
            rows * len(prototypes_KC), dtype=work_dtype(prototypes_KC), device=prototypes_KC.device
        )
        self._num_prototypes = len(prototypes_KC)

    def rows(self, count: int) -> Tensor:
        """(count, K), what is in it undefined."""
        return self._flat[: count * self._num_prototypes].view(count, self._num_prototypes)

    def logits(self, codes: Tensor, prototypes_KC: Tensor) -> Tensor:
        """(…, C) → (…, K): multiplied in the codes' precision, held in at least float32."""
        # As one matrix: a product with a batch in front may copy the prototypes for each of its items.
        low_MC = codes.flatten(0, -2)
        logits_MK = self.rows(len(low_MC))
        if low_MC.dtype == logits_MK.dtype == prototypes_KC.dtype:
            torch.mm(low_MC, prototypes_KC.T, out=logits_MK)
        else:
            logits_MK.copy_(low_MC @ prototypes_KC.to(low_MC.dtype).T)
        logits: Tensor = logits_MK.unflatten(0, codes.shape[:-1])
        return logits


class _LinearGradients:
    """Sums of a linear layer's gradients over chunks, in at least float32."""

    def __init__(self, codes_RNC: Tensor, prototypes_KC: Tensor) -> None:
        self._low_codes_RNC, self._low_prototypes_KC = codes_RNC, prototypes_KC
        self.codes_RNC = torch.empty_like(codes_RNC, dtype=work_dtype(codes_RNC))
        self.prototypes_KC = torch.zeros_like(prototypes_KC, dtype=work_dtype(prototypes_KC))

    def add(self, logits_RnK: Tensor, items: slice) -> None:
        """Add what follows from the gradient of some items' logits."""
        low_MC = self._low_codes_RNC[:, items].flatten(0, 1)
        gradient_MK = logits_RnK.flatten(0, 1).to(low_MC.dtype)
        found_MC = gradient_MK @ self._low_prototypes_KC
        self.codes_RNC[:, items] = found_MC.unflatten(0, logits_RnK.shape[:2]).to(self.codes_RNC.dtype)
        if low_MC.dtype == self.prototypes_KC.dtype:
            self.prototypes_KC.addmm_(gradient_MK.T, low_MC)
        else:
            self.prototypes_KC += gradient_MK.T @ low_MC


@torch.no_grad()
def chunked_sinkhorn_scaling(
    codes_NC: Tensor,
    prototypes_KC: Tensor,
    temperature: float,
    *,
    chunk_rows: int,
    weights_N: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    reduce: Reduce = identity,
    num_iterations: int = 3,
) -> Tensor:
    """:func:`~orchestrator.objectives.sinkhorn.sinkhorn_scaling` of the logits of codes, a chunk of rows at a time.

    The logits are made anew in each of the `num_iterations` passes over the rows.

    Args:
        codes_NC: this worker's teacher bottleneck vectors; N may differ between workers and may be 0.
        prototypes_KC: the teacher's.
        chunk_rows: rows whose logits are held at once.
        lengths: rows of each block. No chunk then spans two of them: a product of matrices rounds a row by what it is
            computed with, and which blocks a worker has should not show.
        temperature, weights_N, reduce, num_iterations: as there.

    Returns:
        log_v_K, as there.

    Raises:
        ValueError: a temperature, number of iterations or `chunk_rows` that makes no sense.
    """
    check_settings(temperature, num_iterations)
    step = _items(chunk_rows, 1)
    codes, prototypes, work = _low(codes_NC), _low(prototypes_KC), work_dtype(codes_NC)
    weights_N = codes_NC.new_ones(len(codes_NC), dtype=work) if weights_N is None else weights_N.to(work)
    space = _Space(min(step, len(codes)), prototypes)
    chunks = [
        slice(start + rows.start, start + rows.stop)
        for start, length in _starts(lengths or [len(codes)])
        for rows in _chunks(length, step)
    ]

    def scaled(rows: slice) -> Tensor:
        return space.logits(codes[rows], prototypes).div_(temperature)

    with torch.autocast(codes_NC.device.type, enabled=False):
        log_sum_K = prototypes.new_full((len(prototypes),), -torch.inf, dtype=torch.float64)
        for rows in chunks:
            log_sum_K = torch.logaddexp(log_sum_K, column_logsumexp(scaled(rows), weights_N[rows]))
        log_v_K = -logsumexp_over_workers(log_sum_K, reduce).to(work)
        v_K: Tensor | None = None
        for _ in range(num_iterations - 1):
            sums_K = torch.zeros_like(log_v_K, dtype=torch.float64)
            for rows in chunks:
                probabilities_nK = _softmax_(scaled(rows).add_(log_v_K))
                # The rows' scaling of the iteration before, which needs no logits but these.
                u_n = weights_N[rows] if v_K is None else weights_N[rows] / row_sums(probabilities_nK, v_K)
                sums_K += column_sums(probabilities_nK, u_n)
            v_K = reduce(sums_K).to(work).clamp_min(torch.finfo(work).tiny).reciprocal()
        return log_v_K if v_K is None else log_v_K + v_K.log()


def _softmax_(scaled: Tensor) -> Tensor:
    """Softmax over the last dimension, in place."""
    scaled.sub_(scaled.amax(dim=-1, keepdim=True)).exp_()
    return scaled.div_(scaled.sum(dim=-1, keepdim=True))


def _low(tensor: Tensor) -> Tensor:
    """In the dtype that autocast would give to products."""
    device = tensor.device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
    return tensor.detach().to(wanted)


def _chunks(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, max(1, step)):
        yield slice(start, min(start + step, count))


def _starts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for length in lengths:
        yield start, length
        start += length


def _items(chunk_rows: int, rows_per_item: int) -> int:
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, not {chunk_rows}")
    return max(1, chunk_rows // rows_per_item)
