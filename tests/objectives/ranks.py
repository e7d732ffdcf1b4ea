"""The objectives on real gloo ranks: `python ranks.py FOLDER` forks three, which also form groups of 1 and 2.

A step has five blocks of unequal numbers of masked tokens. Ranks own whole blocks, one rank none at all; Sinkhorn's
sums, the loss and its gradient cross ranks as in the training loop.
"""

from __future__ import annotations

import multiprocessing
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.objectives.dino import dino_loss
from orchestrator.objectives.gram import gram_loss
from orchestrator.objectives.ibot import ibot_loss
from orchestrator.objectives.koleo import koleo
from orchestrator.objectives.sinkhorn import sinkhorn_scaling, targets

TEMPERATURE = 0.07
NUM_VIEWS, NUM_IMAGES, NUM_PATCHES, DIM, NUM_PROTOTYPES = 2, 3, 5, 6, 9
MASKED = (4, 0, 1, 7, 3)
# How the five blocks lie on the ranks: all counts, unequal shares, and a rank with nothing.
SPLITS: dict[str, tuple[tuple[int, ...], ...]] = {
    "1": ((0, 1, 2, 3, 4),),
    "2": ((0, 2, 4), (1, 3)),
    "2, unequal": ((1,), (4, 3, 2, 0)),
    "2, one empty": ((), (0, 1, 2, 3, 4)),
    "3": ((0, 3), (1, 4), (2,)),
    "3, one empty": ((0, 1, 2), (), (3, 4)),
    "3, one without a masked token": ((0, 2), (1,), (3, 4)),
}


@dataclass(frozen=True)
class BlockOfRows:
    """One block's teacher and student features; the prototypes are the same for all blocks."""

    teacher_VBD: Tensor
    student_VBD: Tensor
    teacher_tokens_MD: Tensor
    student_tokens_MD: Tensor
    crop_of_M: Tensor
    teacher_patches_BPD: Tensor
    student_patches_BPD: Tensor


def make_block(index: int, dtype: torch.dtype) -> BlockOfRows:
    random = torch.Generator().manual_seed(index)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    views, tokens = (NUM_VIEWS, NUM_IMAGES, DIM), (MASKED[index], DIM)
    patches = (NUM_IMAGES, NUM_PATCHES, DIM)
    crops = torch.randint(NUM_VIEWS * NUM_IMAGES, (MASKED[index],), generator=random)
    return BlockOfRows(
        # Blocks of unlike size: a rank's own maximum is not the batch's.
        (index + 1) * draw(*views), draw(*views), (5 - index) * draw(*tokens), draw(*tokens),
        crops, draw(*patches), draw(*patches),
    )  # fmt: skip


def make_prototypes(dtype: torch.dtype) -> Tensor:
    return torch.randn(DIM, NUM_PROTOTYPES, generator=torch.Generator().manual_seed(99)).to(dtype)


def step(own: tuple[int, ...], group: dist.ProcessGroup | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one rank has after a step: the scalings, its targets, and the global loss and gradient."""

    def reduce(tensor: Tensor) -> Tensor:
        # The empty rank's gradient is one number seen through strides of 0: gloo would write past its end.
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=group)
        return tensor

    blocks = [make_block(index, dtype) for index in own]
    teacher_DK = make_prototypes(dtype)
    student_DK = (teacher_DK * 0.5).requires_grad_()
    empty = torch.empty(0, DIM, dtype=dtype)
    dino_NK = torch.cat([empty, *(block.teacher_VBD.flatten(0, 1) for block in blocks)]) @ teacher_DK
    ibot_NK = torch.cat([empty, *(block.teacher_tokens_MD for block in blocks)]) @ teacher_DK
    dino_v = sinkhorn_scaling(dino_NK, TEMPERATURE, reduce=reduce)
    ibot_v = sinkhorn_scaling(ibot_NK, TEMPERATURE, reduce=reduce)
    # The padding of the training loop: a rank without blocks still takes part in the backward pass.
    loss = student_DK.sum() * 0
    results = {"dino_v": dino_v, "ibot_v": ibot_v}
    for index, block in zip(own, blocks, strict=True):
        dino_VBK = targets(block.teacher_VBD @ teacher_DK, TEMPERATURE, dino_v)
        ibot_MK = targets(block.teacher_tokens_MD @ teacher_DK, TEMPERATURE, ibot_v)
        views_VBD = block.student_VBD @ (student_DK @ student_DK.T)
        terms = [
            dino_loss(block.student_VBD @ student_DK, dino_VBK),
            ibot_loss(block.student_tokens_MD @ student_DK, ibot_MK, block.crop_of_M, NUM_VIEWS * NUM_IMAGES),
            0.1 * koleo(views_VBD[0]),
            2 * gram_loss(block.student_patches_BPD @ student_DK, block.teacher_patches_BPD),
        ]
        loss = loss + torch.stack(terms).sum() / len(MASKED)
        results |= {f"dino_{index}": dino_VBK, f"ibot_{index}": ibot_MK}
    (gradient,) = torch.autograd.grad(loss, student_DK)
    return results | {"loss": reduce(loss.detach()), "gradient": reduce(gradient)}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=patience)
    groups = {world: dist.new_group(list(range(world))) for world in (1, 2, 3)}
    results: dict[Any, Any] = {}
    for split, shares in SPLITS.items():
        if rank < len(shares):
            for dtype in (torch.float32, torch.float64):
                out = step(shares[rank], groups[len(shares)], dtype)
                results |= {f"{split}/{dtype}/{name}": value.numpy() for name, value in out.items()}
    np.savez(folder / f"rank-{rank}.npz", **results)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that torch is imported once.
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=main, args=(Path(sys.argv[1]), rank)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
