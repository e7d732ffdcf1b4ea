"""InfoNCE in a ring against the plain float64 formula, in one process and on real gloo workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import orchestrator
from orchestrator.objectives import contrastive
from orchestrator.objectives.contrastive import Ring, alone, contrast, info_nce
from orchestrator.training.collectives import AllWorkers

# Of the distributed runs. The cuts of each number of workers are unequal; one worker of three has nothing.
NUM_PAIRS, DIM = 11, 6
CUTS = {1: (0, 11), 2: (0, 4, 11), 3: (0, 7, 7, 11)}


def pairs(
    count: int = NUM_PAIRS, dim: int = DIM, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    return image, image / 2 + text


def formula(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Every pair's loss, written as sums of exponentials, float64."""
    x = image.double() / image.double().norm(dim=1, keepdim=True)
    y = text.double() / text.double().norm(dim=1, keepdim=True)
    losses = []
    for n in range(len(x)):
        rows = torch.stack([scale.double() * (x[n] @ other) for other in y])
        columns = torch.stack([scale.double() * (other @ y[n]) for other in x])
        shift = torch.maximum(rows.max(), columns.max()).detach()
        both = (rows - shift).exp().sum().log() + (columns - shift).exp().sum().log() + 2 * shift
        losses.append(both / 2 - scale.double() * (x[n] @ y[n]))
    return torch.stack(losses)


def expected(image: Tensor, text: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in (image, text, log_scale)]
    loss = formula(leaves[0], leaves[1], leaves[2].exp()).mean()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def in_blocks(
    image: Tensor, text: Tensor, log_scale: Tensor, cuts: tuple[int, ...], ring: Ring = alone
) -> tuple[Tensor, ...]:
    """Σ of the losses of local pairs and its gradients, blocks of pairs one after the other."""
    found = contrast(image, text, log_scale.exp(), ring)
    leaves = [leaf.detach().requires_grad_() for leaf in (image, text, log_scale)]
    total = torch.zeros((), dtype=image.dtype) + 0 * leaves[2]
    for start, stop in pairwise(cuts):
        if start < stop:
            part = found.rows(start, stop)
            own = leaves[0][start:stop], leaves[1][start:stop]
            total = total + (stop - start) * info_nce(*own, leaves[2].exp(), part)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return total.detach(), *gradients


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], count: int) -> None:
    """`got` are sums over pairs, `want` means."""
    for ours, reference in zip(got, want, strict=True):
        largest = max(float(reference.abs().max()), 1e-3)
        assert float((ours.double() / count - reference).abs().max()) < 1e-5 * largest


@pytest.mark.parametrize("scale", [0.5, 7.0, 100.0])
@pytest.mark.parametrize("cuts", [(0, 11), (0, 1, 5, 11), tuple(range(12))])
def test_blocks_add_up_to_the_formula(scale: float, cuts: tuple[int, ...]) -> None:
    image, text = pairs(dtype=torch.float32)
    log_scale = torch.tensor(scale).log()
    check(in_blocks(image, text, log_scale, cuts), expected(image, text, log_scale), NUM_PAIRS)


def test_chunks_of_columns_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "_CHUNK", 4)
    image, text = pairs(dtype=torch.float32)
    log_scale = torch.tensor(2.0)
    check(in_blocks(image, text, log_scale, (0, 11)), expected(image, text, log_scale), NUM_PAIRS)
    assert contrast(image, image, 10.0).hit_B.tolist() == [1.0] * NUM_PAIRS


def test_extreme_pairs_stay_exact() -> None:
    """Copies of one pair, a caption turned against its photo, long and short vectors; one pair alone."""
    image, text = pairs()
    image[1], text[1] = image[0], text[0]
    text[2] = -image[2]
    image[3] *= 1e6
    text[4] *= 1e-6
    log_scale = torch.tensor(100.0, dtype=torch.float64).log()
    check(in_blocks(image, text, log_scale, (0, 11)), expected(image, text, log_scale), NUM_PAIRS)
    loss, *gradients = in_blocks(image[:1], text[:1], log_scale, (0, 1))
    assert loss.abs() < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_low_precision_embeddings_are_compared_in_float32() -> None:
    image, text = pairs(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast(image, text, 50.0)
    assert found.loss_B.dtype == torch.float32
    want = formula(image.float(), text.float(), torch.tensor(50.0))
    torch.testing.assert_close(found.loss_B.double(), want, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    image, text = (part.requires_grad_() for part in pairs(5, 3))
    log_scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        return info_nce(image, text, log_scale.exp(), contrast(image, text, log_scale.exp()))

    assert torch.autograd.gradcheck(loss, (image, text, log_scale))


def test_hits_are_partners_nearer_than_all_others() -> None:
    image, text = torch.eye(4), torch.eye(4)
    assert contrast(image, text, 10.0).hit_B.tolist() == [1, 1, 1, 1]
    # Texts 0 and 1 exchanged: neither direction finds them.
    assert contrast(image, text[[1, 0, 2, 3]], 10.0).hit_B.tolist() == [0, 0, 1, 1]
    assert contrast(torch.ones(4, 3), torch.ones(4, 3), 10.0).hit_B.tolist() == [0, 0, 0, 0]


def test_pairs_must_pair_up() -> None:
    with pytest.raises(ValueError, match="are not pairs"):
        contrast(torch.ones(3, 2), torch.ones(2, 2), 1.0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def largest_tensor(local: int, world: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a step on the first of `world` workers with `local` pairs each; the others only send."""
    monkeypatch.setattr(contrastive, "_CHUNK", 32)
    image, text = pairs(local, 8, torch.float32)

    def ring(rows: Tensor) -> Iterator[Tensor]:
        yield rows
        for _ in range(world - 1):
            yield torch.randn_like(rows)

    with Largest() as seen:
        in_blocks(image, text, torch.tensor(1.0), (0, local), ring)
    return seen.numel


def test_memory_is_linear_in_the_local_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all workers' embeddings (N×D) nor local similarities (B×N, B×B) are ever one tensor."""
    alone, many = (largest_tensor(64, world, monkeypatch) for world in (1, 32))
    assert many == alone
    assert largest_tensor(256, 4, monkeypatch) <= 4 * alone
    assert alone <= 64 * 32


@pytest.mark.cluster
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.timeout(120)
def test_gloo_workers_agree_with_the_formula(world: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(orchestrator.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path), str(world)]
    others = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(1, world)]
    _work_over_gloo(tmp_path, world, 0)
    assert [other.wait(60) for other in others] == [0] * (world - 1)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    log_scale = torch.tensor(3.0)
    want = expected(*pairs(dtype=torch.float32), log_scale)
    # The sums of losses and of the scale's gradients add up; embeddings' gradients stand one after the other.
    got = [sum(parts) if parts[0].dim() == 0 else torch.cat(parts) for parts in zip(*found, strict=True)]
    check(tuple(got), want, NUM_PAIRS)
    turns = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    sizes = [stop - start for start, stop in pairwise(CUTS[world])]
    assert turns == [[sizes[(rank - turn) % world] for turn in range(world)] for rank in range(world)]


def _work_over_gloo(folder: Path, world: int, rank: int) -> None:
    meeting, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
    workers = AllWorkers()
    start, stop = CUTS[world][rank : rank + 2]
    image, text = (part[start:stop] for part in pairs(dtype=torch.float32))
    local = in_blocks(image, text, torch.tensor(3.0), (0, (stop - start) // 2, stop - start), workers.ring)
    torch.save(local, folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps([len(rows) for rows in workers.ring(image)]))
    dist.destroy_process_group()


if __name__ == "__main__":
    _work_over_gloo(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
