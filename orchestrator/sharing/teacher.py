"""A teacher actor: takes a step from the desk, computes it, puts it into the object store, and again."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from orchestrator.sharing.bundle import Parts, StepTeacher, blocks_per_chunk, chunks, num_bytes
from orchestrator.sharing.desk import Delivered
from orchestrator.sharing.line import Line

logger = logging.getLogger("orchestrator")


class TeacherActor:
    """One of any number of equal teachers; each computes whole steps, so they never talk to each other.

    Args:
        name: known by it at the desk.
        desk: the desk's name.
        make: builds the network and what it reads, in this process.
        num_blocks: blocks of a step.
        patience_s: how long the desk may be away.
    """

    def __init__(
        self, name: str, desk: str, make: Callable[[], StepTeacher], num_blocks: int, patience_s: float
    ) -> None:
        self._name, self._make, self._num_blocks = name, make, num_blocks
        self._desk = Line(desk, patience_s)
        self._teacher: StepTeacher | None = None

    def work(self) -> None:
        """Compute steps until the desk says that it is enough.

        Raises:
            RuntimeError: the desk was away for too long.
        """
        while True:
            answer = self._desk.call("take", self._name)
            if "end" in answer:
                return
            if "step" in answer:
                self._compute(answer["step"])

    def idle(self) -> None:
        """Keep the process, and with it what it has put into the object store."""

    def _compute(self, step: int) -> None:
        try:
            # Built at the first step, so that what keeps it from being built reaches a student.
            teacher = self._teacher = self._teacher or self._make()
            before = teacher.images_forwarded
            parts = teacher(step)
            images = teacher.images_forwarded - before
        except Exception as error:
            logger.exception("the teacher failed at step %d", step)
            why = f"the teacher failed at step {step}: {type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
            self._desk.call("fail", self._name, step, why, trace)
            return
        there = put(parts, self._num_blocks)
        size = sum(num_bytes(bundle) for bundle in parts.values())
        self._desk.call("deliver", self._name, step, there, images, teacher.images_per_step, size)


def put(parts: Parts, num_blocks: int) -> Delivered:
    """The parts of a step as objects of Ray's."""
    import ray

    refs, per_chunk = {}, {}
    for name, bundle in parts.items():
        per_chunk[name] = blocks_per_chunk(bundle, num_blocks)
        refs[name] = [ray.put(chunk) for chunk in chunks(bundle, num_blocks, per_chunk[name])]
    return Delivered(refs, per_chunk)
