"""A teacher actor: takes a step from the coordinator, computes it, puts it into the object store, and again."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

from orchestrator.errors import UserError
from orchestrator.teacher_service.actor_client import ActorClient
from orchestrator.teacher_service.coordinator import StepRefs
from orchestrator.teacher_service.payload import (
    Parts,
    Prefetches,
    StepTeacher,
    blocks_per_chunk,
    chunks,
    num_bytes,
)

logger = logging.getLogger("orchestrator")


class TeacherActor:
    """One of any number of equal teachers; each computes whole steps, so they never talk to each other.

    Args:
        name: by which the coordinator knows it.
        coordinator: the coordinator's name.
        make: builds the network and what it reads, in this process.
        num_blocks: blocks of a step.
        patience_s: how long the coordinator may be away.
    """

    def __init__(
        self, name: str, coordinator: str, make: Callable[[], StepTeacher], num_blocks: int, patience_s: float
    ) -> None:
        self._name, self._make, self._num_blocks = name, make, num_blocks
        self._coordinator = ActorClient(coordinator, patience_s)
        self._teacher: StepTeacher | None = None
        self._store: Any = None

    def work(self) -> None:
        """Compute steps until the coordinator has no more for this teacher.

        Raises:
            RuntimeError: the coordinator was away for too long.
        """
        while True:
            answer = self._coordinator.call("next_step", self._name)
            if "end" in answer:
                break
            if "step" in answer:
                self._compute(answer["step"], answer["next"])
        if self._store is not None:
            self._close()

    def listen(self, world: int) -> int:
        """The port at which the others of one teacher meet this process."""
        from orchestrator.teacher_service import sharding

        self._store = sharding.listen(world)
        return int(self._store.port)

    def lead(self, world: int, port: int) -> None:
        """As :meth:`work`, with the other processes of this teacher.

        Args:
            world: how many they are.
            port: what `listen` returned. An actor's calls may run side by side: asking for it waits for that.

        Raises:
            RuntimeError: the coordinator was away for too long.
        """
        from orchestrator.teacher_service import sharding

        sharding.join(0, world, port, self._store)
        # All processes have to be in it at once, so this cannot wait for the first step.
        self._teacher = self._make()
        self.work()

    def follow(self, rank: int, world: int, port: int) -> None:
        """Do this process's part of what the first one does, until it ends."""
        from orchestrator.teacher_service import sharding

        sharding.join(rank, world, port)
        teacher: Any = self._make()
        teacher.follow()

    def _close(self) -> None:
        teacher: Any = self._teacher
        teacher.close()

    def idle(self) -> None:
        """Keep the process, and with it what it has put into the object store."""

    def _compute(self, step: int, following: int | None) -> None:
        try:
            # Built at the first step, so that what keeps it from being built reaches a student.
            teacher = self._teacher = self._teacher or self._make()
            if following is not None and isinstance(teacher, Prefetches):
                teacher.expect(following)
            before = teacher.images_forwarded
            parts = teacher(step)
            images = teacher.images_forwarded - before
        except Exception as error:
            if self._store is not None:
                # One of several processes may just have been killed, and the others are out of step: all start anew.
                raise
            logger.exception("the teacher failed at step %d", step)
            why = f"the teacher failed at step {step}: {type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
            mistake = (error.what, error.where, error.hint) if isinstance(error, UserError) else None
            self._coordinator.call("fail", self._name, step, why, trace, mistake)
            return
        there = put(parts, self._num_blocks)
        size = sum(num_bytes(outputs) for outputs in parts.values())
        self._coordinator.call("publish", self._name, step, there, images, teacher.images_per_step, size)


def put(parts: Parts, num_blocks: int) -> StepRefs:
    """The parts of a step as objects of Ray's."""
    import ray

    refs, per_chunk = {}, {}
    for name, outputs in parts.items():
        per_chunk[name] = blocks_per_chunk(outputs, num_blocks)
        refs[name] = [ray.put(chunk) for chunk in chunks(outputs, num_blocks, per_chunk[name])]
    return StepRefs(refs, per_chunk)
