"""The views of whole steps: made once, for the teacher and for students with sizes of their own."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.blocks import Block, CropBlocks
from orchestrator.data.views import CropConfig
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.distill.config import Distill

# Steps whose views are kept or in the making: one that is worked on, and one that is expected.
_BEGUN = 2


class StepViews:
    """The views of whole steps, for a teacher and for students with sizes of their own. Made in threads.

    Args:
        config: the stage.
        recipe: the teacher's; None if it looks at no masks.
        index_folder: the photographs.
        seed: of the stage.
        sets: views that students fetch, by part.
        roots: where the datasets are, see :meth:`ImageIndex.load`.
    """

    def __init__(
        self,
        config: Distill,
        recipe: ModelRecipe | None,
        index_folder: Path,
        seed: int,
        sets: Mapping[str, CropConfig],
        *,
        roots: Mapping[str, str] | None = None,
    ) -> None:
        self._teachers = crop_blocks(config, recipe, index_folder, seed, roots=roots)
        self.num_blocks = self._teachers.num_blocks
        self._shared = [part for part, crops in sets.items() if crops == config.crops]
        self._others = {
            part: crop_blocks(config, None, index_folder, seed, crops, roots=roots)
            for part, crops in sets.items()
            if crops != config.crops
        }
        # Decoding and resizing let go of the interpreter.
        self._threads = ThreadPoolExecutor(config.teacher_threads, thread_name_prefix="views")
        self._begun: dict[int, _Begun] = {}

    def expect(self, step: int) -> None:
        """Make the views of `step` beside whatever else is done; those of a step expected before are forgotten."""
        if step in self._begun:
            return
        for other in list(self._begun):
            for future in self._begun.pop(other).futures():
                future.cancel()
        self._begun[step] = self._begin(step)

    def blocks(self, step: int) -> list[Block]:
        """What the teacher looks at: a block's views and masks."""
        begun = self._begun[step] = self._begun.get(step) or self._begin(step)
        while len(self._begun) > _BEGUN:
            del self._begun[next(iter(self._begun))]
        return [future.result() for future in begun.teachers]

    def block(self, step: int, index: int) -> Block:
        """One of :meth:`blocks`."""
        return self._teachers.load(step, index)

    def parts(self, step: int) -> dict[str, dict[str, NDArray[Any]]]:
        """What students fetch, by part. The last that is asked of a step."""
        begun = self._begun.pop(step, None) or self._begin(step, bool(self._shared))
        parts = {}
        for part in self._shared:
            parts[part] = _joined([future.result() for future in begun.teachers])
        for part, futures in begun.others.items():
            parts[part] = _joined([future.result() for future in futures])
        return parts

    def _begin(self, step: int, teachers: bool = True) -> _Begun:
        def start(source: CropBlocks) -> list[Future[Block]]:
            return [self._threads.submit(source.load, step, index) for index in range(self.num_blocks)]

        others = {part: start(source) for part, source in self._others.items()}
        return _Begun(start(self._teachers) if teachers else [], others)


@dataclass(frozen=True)
class _Begun:
    """Blocks of a step that are being made: the teacher's, and other views by part."""

    teachers: list[Future[Block]]
    others: dict[str, list[Future[Block]]]

    def futures(self) -> list[Future[Block]]:
        return [*self.teachers, *(future for futures in self.others.values() for future in futures)]


def regenerated_views(
    config: Distill,
    index_folder: Path,
    seed: int,
    crops: CropConfig,
    *,
    roots: Mapping[str, str] | None = None,
) -> CropBlocks:
    """A `BlockSource` of a student's own views, without masks: those belong to the teacher's words."""
    return crop_blocks(config, None, index_folder, seed, crops, roots=roots)


def _joined(blocks: list[Block]) -> dict[str, NDArray[Any]]:
    return {
        name: np.concatenate([block.arrays[name] for block in blocks], axis=1)
        for name in _only_views(blocks[0])
    }


def _only_views(block: Block) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in block.arrays.items() if name != "masks"}
