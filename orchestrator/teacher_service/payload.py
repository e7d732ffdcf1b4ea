"""What a teacher puts out for one step, and how it is cut: into chunks for the object store, into blocks for workers.

An array's name says how it is cut: `step/NAME` belongs to the whole step and goes to every block as NAME;
`ragged/NAME` are rows of all blocks on end, cut at `offsets/NAME` (num_blocks + 1,); `ids` (batch,) are the samples;
every other array has its batch on axis 1 and is cut into equal parts. `step/unreadable` (R,), if it is there, are the
rows of the step whose files could not be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.blocks import Block

StepOutputs = Mapping[str, NDArray[Any]]
Parts = Mapping[str, StepOutputs]
"""The outputs of a step by part: "teacher", and "views" or "views/NAME". A student fetches only its own."""

TEACHER = "teacher"
VIEWS = "views"

# Ray moves large objects well and many small ones badly.
CHUNK_BYTES = 16 * 2**20


def samples(blocks: Sequence[Block]) -> dict[str, NDArray[np.int64]]:
    """What outputs say of the samples of a step's blocks."""
    outputs = {"ids": np.concatenate([block.ids for block in blocks])}
    unreadable = np.concatenate([block.unreadable for block in blocks])
    return {**outputs, "step/unreadable": unreadable} if len(unreadable) else outputs


class StepTeacher(Protocol):
    """Computes all that students need for one step, from nothing but its number."""

    @property
    def images_per_step(self) -> int:
        """Images, not crops."""

    @property
    def images_forwarded(self) -> int:
        """How many images went through the network so far."""

    def __call__(self, step: int) -> Parts: ...


@runtime_checkable
class Prefetches(Protocol):
    """A `StepTeacher` that can prepare a step beside its work on another."""

    def expect(self, step: int) -> None:
        """`step` is probably the next but one that is asked for; being wrong costs only what was prepared."""


def num_bytes(outputs: StepOutputs) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for array in outputs.values())


def blocks_per_chunk(outputs: StepOutputs, num_blocks: int) -> int:
    """How many blocks to put into one object: the minimum that makes it large, or all."""
    per_block = max(1, num_bytes(outputs) // num_blocks)
    return min(num_blocks, -(-CHUNK_BYTES // per_block))


def chunks(outputs: StepOutputs, num_blocks: int, per_chunk: int) -> list[StepOutputs]:
    """Outputs of `per_chunk` blocks each, the last of what is left; arrays are contiguous, as Ray copies others."""
    starts = range(0, num_blocks, per_chunk)
    return [_slice(outputs, start, min(start + per_chunk, num_blocks), num_blocks) for start in starts]


def block(
    chunk: StepOutputs, index: int, num_blocks: int
) -> tuple[NDArray[np.int64] | None, dict[str, NDArray[Any]]]:
    """The block `index` of a chunk of `num_blocks`: its samples, if the part says them, and its arrays.

    The arrays are views: whoever keeps them keeps the chunk.
    """
    arrays = {}
    for name, array in _slice(chunk, index, index + 1, num_blocks, copy=False).items():
        kind, _, rest = name.partition("/")
        if kind in ("step", "ragged"):
            arrays[rest] = array
        elif kind != "offsets":
            arrays[name] = array
    return arrays.pop("ids", None), arrays


def _slice(
    outputs: StepOutputs, first: int, end: int, num_blocks: int, copy: bool = True
) -> dict[str, NDArray[Any]]:
    out = {}
    for name, array in outputs.items():
        kind, _, rest = name.partition("/")
        if kind == "step":
            part = array
        elif kind == "ragged":
            offsets = outputs[f"offsets/{rest}"]
            part = array[offsets[first] : offsets[end]]
        elif kind == "offsets":
            part = array[first : end + 1] - array[first]
        elif name == "ids":
            size = len(array) // num_blocks
            part = array[first * size : end * size]
        else:
            size = array.shape[1] // num_blocks
            part = array[:, first * size : end * size]
        out[name] = np.ascontiguousarray(part) if copy else part
    return out
