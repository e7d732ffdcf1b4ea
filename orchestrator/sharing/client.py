"""A student's end of the share service: a `BlockSource` whose blocks come from the teacher's bundles."""

from __future__ import annotations

from typing import Any

import numpy as np

from orchestrator.data.blocks import Block
from orchestrator.sharing.service import Bundle


class SharedBlocks:
    """Blocks cut from the bundle of each step, which every worker on a node reads zero-copy.

    A bundle holds arrays by name: those that start with `step/` belong to the whole step and go to every block
    as they are; `ragged/NAME` are rows of all blocks on end, cut at `offsets/NAME` (num_blocks + 1,); every
    other array has its batch on axis 1 and is cut into equal parts. `ids` (batch,) are the samples.

    Args:
        actor: handle of the `ShareActor`.
        student: the name this student is known by there.
        num_blocks: blocks of a step.
    """

    def __init__(self, actor: Any, student: str, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._actor, self._student = actor, student
        self._held: tuple[int, Bundle] | None = None

    def load(self, step: int, index: int) -> Block:
        """The block `index` of `step`; waits for the teacher."""
        bundle = self._bundle(step)
        ids = _part(bundle["ids"][None], index, self.num_blocks)[0]
        arrays = {}
        for name, array in bundle.items():
            kind, _, rest = name.partition("/")
            if kind == "step":
                arrays[rest] = array.copy()
            elif kind == "ragged":
                first, last = bundle[f"offsets/{rest}"][index : index + 2]
                arrays[rest] = array[first:last].copy()
            elif kind != "offsets" and name != "ids":
                arrays[name] = _part(array, index, self.num_blocks)
        return Block(step, index, ids, arrays)

    def _bundle(self, step: int) -> Bundle:
        import ray

        if self._held is None or self._held[0] != step:
            (ref,) = ray.get(self._actor.step.remote(self._student, step))
            self._held = (step, ray.get(ref))
        return self._held[1]


def _part(array: Any, index: int, num_blocks: int) -> Any:
    size = array.shape[1] // num_blocks
    return np.array(array[:, index * size : (index + 1) * size])
