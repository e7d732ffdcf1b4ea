"""Chunked cross-entropy and Sinkhorn-Knopp: the numbers of the plain ones, without the logits of all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.objectives.chunked import SoftTargets, chunked_cross_entropy, chunked_sinkhorn_scaling
from orchestrator.objectives.dino import cross_entropy, dino_loss
from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets

STUDENT, TEACHER = 0.1, 0.07
CHUNKS = [1, 5, 24, 1000]


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


def prototypes(count: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype)


def dino_setting(dtype: torch.dtype) -> tuple[Tensor, Tensor, SoftTargets]:
    """Two global and three local views of 6 images, 50 prototypes."""
    codes_VBC, prototypes_KC = rows(5, 6, 8, seed=0, dtype=dtype), prototypes(50, 8, 1, dtype)
    teacher_KC = prototypes(50, 8, 2, dtype)
    codes_TBC = rows(2, 6, 8, seed=3, dtype=dtype)
    log_v_K = sinkhorn_scaling((codes_TBC @ teacher_KC.T).flatten(0, 1), TEACHER)
    return codes_VBC, prototypes_KC, SoftTargets(codes_TBC, teacher_KC, log_v_K, TEACHER)


# Globals learn from the other global, locals from both.
SHARES = [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]


def plain_dino(codes_VBC: Tensor, prototypes_KC: Tensor, teacher: SoftTargets, local_weight: float) -> Tensor:
    """Sum over pairs, by the plain objective on whole logits; locals at `local_weight`."""
    logits_VBK = codes_VBC @ prototypes_KC.T
    targets_TBK = targets(teacher.codes_TNC @ teacher.prototypes_KC.T, TEACHER, teacher.log_v_K)
    apart = dino_loss(logits_VBK[:2], targets_TBK, temperature=STUDENT)
    local = dino_loss(logits_VBK[2:], targets_TBK, skip_same=False, temperature=STUDENT)
    return 2 * apart + 6 * local_weight * local


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_dino_equals_the_plain_loss_and_its_gradients(chunk_rows: int) -> None:
    codes, weight, teacher = dino_setting(torch.float32)
    weights_R1 = torch.tensor([1.0, 1.0, 0.7, 0.7, 0.7])[:, None] / 6
    leaves = codes.requires_grad_(), weight.requires_grad_()
    total, losses = chunked_cross_entropy(
        *leaves, teacher, SHARES, weights_R1, temperature=STUDENT, chunk_rows=chunk_rows
    )
    plain = plain_dino(codes, weight, teacher, 0.7)
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close((losses * weights_R1).sum(), plain.detach(), rtol=1e-5, atol=0)
    assert not losses.requires_grad
    for ours, theirs in zip(
        torch.autograd.grad(3 * total, leaves), torch.autograd.grad(3 * plain, leaves), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_with_weights_of_their_own_equal_a_float64_formula(scale: float) -> None:
    """iBOT's form, and logits so large that float32 has no digits left for the differences of neighbours."""
    codes, weight = rows(1, 7, 4, seed=0, dtype=torch.float32), prototypes(12, 4, 1, torch.float32)
    # Codes that float32 multiplies exactly, so that only the loss itself is rounded.
    codes, weight = (codes * 64).round() / 64, (weight * 64).round() / 64 * scale
    teacher = SoftTargets(
        rows(1, 7, 4, seed=2, dtype=torch.float32),
        prototypes(12, 4, 3, torch.float32),
        torch.zeros(12),
        TEACHER,
    )
    weights = torch.linspace(0, 2, 7)[None]
    codes.requires_grad_()
    total, losses = chunked_cross_entropy(
        codes, weight, teacher, [[1.0]], weights, temperature=STUDENT, chunk_rows=3
    )
    total.backward()
    again = codes.detach().double().requires_grad_()
    logits = again[0] @ weight.double().T / STUDENT
    wanted = torch.softmax(teacher.codes_TNC[0].double() @ teacher.prototypes_KC.double().T / TEACHER, dim=-1)
    expected = -(wanted * torch.log_softmax(logits, dim=-1)).sum(dim=-1)
    (expected * weights[0]).sum().backward()
    torch.testing.assert_close(losses[0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(codes.grad.double(), again.grad, rtol=1e-5, atol=1e-6 * scale)


class Anew(torch.autograd.Function):
    """The chunked loss with a graph of its own for every backward pass: gradcheck takes several, ours is for one."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(*leaves)
        return run(*leaves).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            return (None, *torch.autograd.grad(ctx.run(*leaves), leaves, grad))


@pytest.mark.heavy
def test_gradients_by_finite_differences() -> None:
    codes, weight, teacher = dino_setting(torch.float64)
    weights = torch.rand(5, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def run(codes_RNC: Tensor, prototypes_KC: Tensor) -> Tensor:
        return chunked_cross_entropy(codes_RNC, prototypes_KC, teacher, SHARES, weights, chunk_rows=12)[0]

    leaves = codes.requires_grad_(), weight.requires_grad_()
    assert run(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *given: Anew.apply(run, *given), leaves)


def test_bfloat16_is_added_up_in_float32() -> None:
    """640 rows in 40 chunks: sums of bf16 gradients in bf16 would be off by percents."""
    codes, weight = rows(1, 640, 16, seed=0, dtype=torch.bfloat16), prototypes(64, 16, 1, torch.bfloat16)
    teacher = SoftTargets(rows(1, 640, 16, seed=2), prototypes(64, 16, 3), torch.zeros(64), TEACHER)

    def gradients(dtype: torch.dtype, chunk_rows: int) -> tuple[Tensor, ...]:
        leaves = codes.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        low = SoftTargets(
            teacher.codes_TNC.to(dtype), teacher.prototypes_KC.to(dtype), torch.zeros(64), TEACHER
        )
        total, losses = chunked_cross_entropy(
            *leaves, low, [[1.0]], torch.full((1, 640), 1 / 640), chunk_rows=chunk_rows
        )
        assert total.dtype == losses.dtype == torch.promote_types(dtype, torch.float32)
        return torch.autograd.grad(total, leaves)

    exact = gradients(torch.float64, 640)
    for ours, once, true in zip(
        gradients(torch.bfloat16, 16), gradients(torch.bfloat16, 640), exact, strict=True
    ):
        assert ours.dtype == torch.bfloat16
        error, unchunked = ((found.double() - true).norm() / true.norm() for found in (ours, once))
        assert unchunked < 0.02
        assert error < 1.2 * unchunked


def test_autocast_multiplies_low_and_adds_up_high() -> None:
    codes, weight, teacher = dino_setting(torch.float32)
    leaves = codes.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, losses = chunked_cross_entropy(*leaves, teacher, SHARES, torch.ones(1, 1), chunk_rows=8)
        wide = plain_dino(*leaves, teacher, 1.0) * 6
    assert total.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(total, wide, rtol=5e-3, atol=0)
    full, _ = chunked_cross_entropy(*leaves, teacher, SHARES, torch.ones(1, 1), chunk_rows=8)
    assert total.item() != full.item(), "autocast did nothing"
    assert [gradient.dtype for gradient in torch.autograd.grad(total, leaves)] == [torch.float32] * 2


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *made, 0)
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as seen:
        yield seen


def test_the_logits_of_all_rows_are_never_there() -> None:
    num_rows, num_prototypes, dim, chunk = 96, 256, 8, 12
    codes = rows(1, num_rows, dim, seed=0, dtype=torch.float32).requires_grad_()
    weight = prototypes(num_prototypes, dim, 1, torch.float32).requires_grad_()
    teacher_codes = rows(1, num_rows, dim, seed=2, dtype=torch.float32)
    teacher_weight = prototypes(num_prototypes, dim, 3, torch.float32)
    with largest() as seen:
        log_v = chunked_sinkhorn_scaling(teacher_codes[0], teacher_weight, TEACHER, chunk_rows=chunk)
        teacher = SoftTargets(teacher_codes, teacher_weight, log_v, TEACHER)
        chunked_cross_entropy(codes, weight, teacher, [[1.0]], torch.ones(1, 1), chunk_rows=chunk)[
            0
        ].backward()
    assert seen.numel == chunk * num_prototypes
    with largest() as seen:
        wanted = targets(teacher_codes[0] @ teacher_weight.T, TEACHER, log_v)
        cross_entropy(codes[0] @ weight.T, wanted).sum().backward()
    assert seen.numel == num_rows * num_prototypes


def test_views_count_as_rows() -> None:
    codes, weight, teacher = dino_setting(torch.float32)
    with largest() as seen:  # five student views an image: two images at once
        chunked_cross_entropy(codes, weight, teacher, SHARES, torch.ones(1, 1), chunk_rows=12)
    assert seen.numel == 10 * 50


def test_its_gradient_is_taken_once() -> None:
    codes, weight, teacher = dino_setting(torch.float32)
    total, _ = chunked_cross_entropy(
        codes.requires_grad_(), weight, teacher, SHARES, torch.ones(1, 1), chunk_rows=8
    )
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_no_rows_and_bad_settings() -> None:
    codes, weight, teacher = dino_setting(torch.float32)
    nothing = SoftTargets(teacher.codes_TNC[:1, :0], teacher.prototypes_KC, teacher.log_v_K, TEACHER)
    leaves = codes[:1, :0].requires_grad_(), weight.requires_grad_()
    total, losses = chunked_cross_entropy(*leaves, nothing, [[1.0]], torch.ones(1, 1), chunk_rows=8)
    assert (total.item(), losses.shape) == (0, (1, 0))
    total.backward()
    assert weight.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="student rows of 0 items, targets of 6"):
        chunked_cross_entropy(*leaves, teacher, SHARES, torch.ones(1, 1), chunk_rows=8)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, not 0"):
        chunked_cross_entropy(*leaves, nothing, [[1.0]], torch.ones(1, 1), chunk_rows=0)
    with pytest.raises(ValueError, match="temperature"):
        chunked_sinkhorn_scaling(codes[0], weight, 0.0, chunk_rows=8)


# --- Sinkhorn-Knopp -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_scaling_equals_that_of_whole_logits(chunk_rows: int, num_iterations: int) -> None:
    codes, weight = rows(37, 8, seed=0, dtype=torch.float32), 2 * prototypes(50, 8, 1, torch.float32)
    weights = torch.tensor([1.0, 0.0, 2.0]).repeat(13)[:37]
    ours = chunked_sinkhorn_scaling(
        codes, weight, 0.04, chunk_rows=chunk_rows, weights_N=weights, num_iterations=num_iterations
    )
    theirs = sinkhorn_scaling(codes @ weight.T, 0.04, weights_N=weights, num_iterations=num_iterations)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert float(theirs.max() - theirs.min()) > 1, "a flat scaling would prove nothing"


@pytest.mark.parametrize("sizes", [[37], [20, 17], [36, 0, 1]])
def test_scaling_of_any_split_over_workers(sizes: list[int]) -> None:
    codes, weight = rows(37, 8, seed=0, dtype=torch.float32), prototypes(50, 8, 1, torch.float32)
    parts, num_workers = codes.split(sizes), len(sizes)
    barrier, slots, results = Barrier(num_workers, timeout=10), [None] * num_workers, [None] * num_workers

    def work(rank: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            slots[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack(slots).sum(dim=0)
            barrier.wait()
            return total

        results[rank] = chunked_sinkhorn_scaling(parts[rank], weight, 0.07, chunk_rows=4, reduce=reduce)

    threads = [Thread(target=work, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logits = (codes @ weight.T).double()
    expected = targets(logits, 0.07, sinkhorn_scaling(logits, 0.07))
    for result in results:
        torch.testing.assert_close(targets(logits, 0.07, result), expected, rtol=1e-4, atol=1e-6)
