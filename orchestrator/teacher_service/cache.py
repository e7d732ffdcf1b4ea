"""The outputs of a frozen teacher, kept in the store: a student that is trained later pays for no teacher at all.

Only the teacher's part is kept, which is small beside the views: those follow from the seed and are made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from orchestrator.storage.store import Store
from orchestrator.teacher_service.payload import TEACHER, Parts, StepOutputs, StepTeacher

logger = logging.getLogger("orchestrator")


class MakesViews(Protocol):
    """The parts of a step that are not the teacher's."""

    def parts(self, step: int) -> Mapping[str, StepOutputs]: ...


class CachedTeacher:
    """A `StepTeacher` that reads outputs from the store, and asks the real one only for steps that are not there.

    Args:
        make_teacher: builds the real one, at the first step that is not kept.
        make_views: builds what makes the other parts.
        where: a store, and a prefix in it.
        images_per_step: images of a step.
    """

    def __init__(
        self,
        make_teacher: Callable[[], StepTeacher],
        make_views: Callable[[], MakesViews],
        where: tuple[Store, str],
        images_per_step: int,
    ) -> None:
        self._make_teacher, self._views = make_teacher, make_views()
        self._store, self._prefix = where
        self._teacher: StepTeacher | None = None
        self.images_per_step = images_per_step

    @property
    def images_forwarded(self) -> int:
        """Images that the real teacher saw."""
        return self._teacher.images_forwarded if self._teacher is not None else 0

    def __call__(self, step: int) -> Parts:
        """The parts of `step`."""
        if (outputs := self._read(step)) is not None:
            return {TEACHER: outputs, **self._views.parts(step)}
        if self._teacher is None:
            self._teacher = self._make_teacher()
        parts = self._teacher(step)
        try:
            self._write(step, parts[TEACHER])
        except OSError as error:
            # A cache that cannot be written is no reason to stop.
            logger.warning("the teacher's outputs of step %d could not be saved: %s", step, error)
        return parts

    def _read(self, step: int) -> dict[str, NDArray[Any]] | None:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            kept: dict[str, NDArray[Any]] = load(self._store.get_bytes(f"{self._prefix}{_name(step)}"))
            return kept
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            logger.warning(
                "the saved outputs of step %d are damaged and will be computed again: %s", step, error
            )
            return None

    def _write(self, step: int, outputs: StepOutputs) -> None:
        from safetensors.numpy import save

        self._store.put_bytes(f"{self._prefix}{_name(step)}", save(dict(outputs)))


class RepeatingTeacher:
    """A `StepTeacher` whose steps come again: that of step t is another's of step t modulo `repeat_after`.

    Args:
        make_teacher: builds the other, whose outputs had better be kept.
        repeat_after: steps that differ.
    """

    def __init__(self, make_teacher: Callable[[], StepTeacher], repeat_after: int) -> None:
        self._teacher, self._repeat_after = make_teacher(), repeat_after
        self.images_per_step = self._teacher.images_per_step

    @property
    def images_forwarded(self) -> int:
        """Images that the other one's network saw."""
        return self._teacher.images_forwarded

    def __call__(self, step: int) -> Parts:
        """The parts of `step`."""
        return self._teacher(step % self._repeat_after)


def _name(step: int) -> str:
    return f"step-{step:08d}.safetensors"
