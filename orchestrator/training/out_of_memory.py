"""Out of memory, on a GPU or not, as a message that says what needed it and what to set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.training.job import Job
    from orchestrator.training.task import BlockTensors

# What torch, its allocators, CUDA's libraries and a slot say in a plain RuntimeError.
_SIGNS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "memoryerror",
)
_LONGEST_REASON = 200
_HINT = (
    "set `activation_checkpointing: true` and, if the stage has it, a smaller `chunk_rows`: both keep the results "
    "the same up to rounding. A smaller `block_size` (with the same `batch_size`) or smaller `crops` need less memory, "
    "too, but change the results, since masks, dropped rows, KoLeo groups and random numbers depend on blocks. More "
    "workers do not change the results, nor does `zero_stage: 3`, which shards the weights over the workers; a block "
    "needs as much memory as before"
)


@contextmanager
def out_of_memory_explained(job: Job, doing: str, blocks: Sequence[BlockTensors] = ()) -> Iterator[None]:
    """Turn what is raised for want of memory into a UserError.

    Args:
        job: what is trained.
        doing: when it happened, such as `in step 7`.
        blocks: those of this worker and step.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:_LONGEST_REASON]
        text = f"{job.name}: out of memory {doing}{_sizes(job, blocks)}"
        raise UserError(f"{text}: {reason}" if reason else text, where=job.where, hint=_HINT) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is want of memory, by its type or by its words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def _sizes(job: Job, blocks: Sequence[BlockTensors]) -> str:
    if not blocks:
        return f", with {job.num_blocks} blocks a step"
    block = blocks[0]
    shapes = ", ".join(f"{name} {_shape(tensor.shape)}" for name, tensor in _largest_first(block.tensors))
    number, each = job.num_blocks, block.num_samples
    samples = f"a batch of {number * each} samples in {number} blocks of {each}"
    return (
        f", with {samples} ({len(blocks)} on this worker, one after the other); a block's arrays are {shapes}"
    )


def _largest_first(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return sorted(tensors.items(), key=lambda item: -item[1].numel())


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
