"""The teacher service of a stage, kept alive by the driver: its coordinator, and as many teachers as are wanted.

The driver does this itself, not Ray's `max_restarts`: a new coordinator has to know what was counted and who is
still in play, and where a teacher may go depends on what is free and on which nodes are about to end.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.data.blocks import BlockSource
from orchestrator.teacher_service.actor_client import NAMESPACE
from orchestrator.teacher_service.coordinator import Status, StepCoordinator
from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.teacher_service.payload import TEACHER, VIEWS, StepTeacher
from orchestrator.teacher_service.placement import machines
from orchestrator.teacher_service.shared_blocks import SharedBlocks
from orchestrator.teacher_service.supervisor import TeacherSupervisor

logger = logging.getLogger("orchestrator")

# Short: see `ray_connection.answer_of`.
_PAUSE_S, _POLL_S = 0.05, 0.1
_FIGURES_EVERY_S = 5.0
# Without an answer for so long, a coordinator is lost; it computes nothing, so only a dead or stopped one is silent.
_SILENCE_S = 30.0
_LAST_WORD_S = 15.0
# A service that is away for less than this part of `stall_timeout_s` stops no student.
_PATIENCE = 0.8


class TeacherService:
    """A teacher service that is there as long as the `with` block lasts, whatever becomes of its actors.

    Args:
        make_teacher: builds a teacher in its actor's process.
        students: who is still to train → the teachers' step it begins with; with none, nothing is started.
        num_steps: steps 0 … num_steps-1 exist.
        num_blocks: blocks of a step.
        teachers: how many there should be now; asked all the time.
        shards: processes that each of them is sharded over.
        window: steps held for the slowest student.
        stall_timeout_s: after so long without a step a student's group counts as hung; the service stays well below.
        gpus: share of a GPU for a teacher; 0 for a CPU.
        account: file that keeps what was counted, over drivers.
        on_metrics: gets the metrics every few seconds and at the end.
        needs: see :class:`TeacherSupervisor`.
    """

    def __init__(
        self,
        make_teacher: Callable[[], StepTeacher],
        students: Mapping[str, int],
        num_steps: int,
        num_blocks: int,
        *,
        window: int,
        stall_timeout_s: float,
        gpus: float,
        account: Path,
        on_metrics: Callable[[Mapping[str, float]], None],
        teachers: Callable[[], int] = lambda: 1,
        shards: int = 1,
        needs: Sequence[tuple[int, float]] = ((1, 1.0),),
    ) -> None:
        self.name = f"share-{uuid.uuid4().hex[:12]}"
        self._num_steps, self._num_blocks, self._window = num_steps, num_blocks, window
        self._students: dict[str, int | None] = dict(students)
        self._stall_timeout_s, self._file, self._on_metrics = stall_timeout_s, account, on_metrics
        self._teachers = teachers
        self._new_supervisor = partial(
            TeacherSupervisor,
            self.name,
            make_teacher,
            num_blocks,
            gpus=gpus,
            stuck_s=stall_timeout_s / 2,
            patience_s=stall_timeout_s,
            shards=shards,
            needs=needs,
        )
        self.account = TeacherCounters.load(account)
        self.status = Status(self.account)
        self.supervisors: list[TeacherSupervisor] = []
        self._coordinator: Any = None
        self._pending: Any = None
        self._trouble = ""
        self._heard = self._reported = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="teacher-service", daemon=True)

    def source(
        self,
        student: str,
        parts: Sequence[str] = (TEACHER, VIEWS),
        own: Callable[[], BlockSource] | None = None,
        offset: int = 0,
    ) -> Callable[[], SharedBlocks]:
        """Makes the block source of a student's workers, in a process that Ray knows; see :class:`SharedBlocks`."""
        patience_s = _PATIENCE * self._stall_timeout_s
        return partial(_source, self.name, student, self._num_blocks, patience_s, tuple(parts), own, offset)

    def deregister(self, student: str) -> None:
        """This student is done, failed or stopped: nobody waits for it any more, whatever coordinator comes next."""
        with self._lock:
            self._students.pop(student, None)
            if self._coordinator is not None:
                self._coordinator.deregister.remote(student)

    def __enter__(self) -> TeacherService:
        if self._students:
            self._poll_once()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        self._ended.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        if self._coordinator is not None:
            try:
                self._adopt(ray.get(self._coordinator.status.remote(), timeout=_LAST_WORD_S))
            except ray.exceptions.RayError as failed:
                logger.warning(
                    "the teacher service did not report its last metrics: %s", type(failed).__name__
                )
            ray.kill(self._coordinator)
        for supervisor in self.supervisors:
            supervisor.close()
        self._report()

    # --- watching -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(_PAUSE_S if self._coordinator is not None else _POLL_S):
            try:
                self._poll_once()
            except Exception:
                # The cluster may be in any state; the next look may find it better.
                logger.exception("the teacher service could not be monitored")

    def _poll_once(self) -> None:
        if self._coordinator is None and not self._open():
            return
        self._poll()
        if self._coordinator is None:
            return
        wanted = max(1, self._teachers())
        while len(self.supervisors) < wanted:
            self.supervisors.append(self._new_supervisor(squeeze=not self.supervisors))
        there = machines() if any(supervisor.needs_machines for supervisor in self.supervisors) else []
        for number, supervisor in enumerate(self.supervisors):
            supervisor.poll(self._coordinator, self.status, there, wanted=number < wanted)
        if time.monotonic() - self._reported > _FIGURES_EVERY_S:
            self._report()

    def _open(self) -> bool:
        """Start a coordinator beside the driver, whose loss ends the stage's attempt anyway."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = sorted(machines(), key=lambda machine: (not machine.head, machine.leaving))
        if not there:
            return False
        remote = ray.remote(StepCoordinator).options(
            name=self.name,
            namespace=NAMESPACE,
            num_cpus=0,
            max_restarts=0,
            max_concurrency=10_000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(there[0].node, soft=False),
        )
        with self._lock:
            try:
                self._coordinator = remote.remote(
                    dict(self._students),
                    self._num_steps,
                    window=self._window,
                    patience_s=self._stall_timeout_s / 3,
                    account=self.account,
                )
            except ValueError:
                return False  # the name is still that of the coordinator before
        self._heard, self._pending = time.monotonic(), None
        return True

    def _poll(self) -> None:
        """Ask the coordinator how things are, and see whether a teacher has ended meanwhile."""
        import ray

        if self._pending is None:
            # It answers after each step: what is not heard of in time is not counted if the coordinator dies.
            self._pending = self._coordinator.status.remote(self.account.images_forwarded)
        ray.wait(
            [self._pending, *(supervisor.finished for supervisor in self.supervisors if supervisor.finished)],
            timeout=_POLL_S,
        )
        ready, _ = ray.wait([self._pending], timeout=0)
        if ready:
            pending, self._pending = self._pending, None
            try:
                self._adopt(ray.get(pending))
            except ray.exceptions.RayError as error:
                self._give_up_on(type(error).__name__)
        elif (quiet := time.monotonic() - self._heard) > _SILENCE_S:
            self._give_up_on(f"it has not answered for {quiet:.0f} s")

    def _adopt(self, status: Status) -> None:
        self.status, self.account, self._heard = status, status.account, time.monotonic()
        if status.trouble != self._trouble:
            self._trouble = status.trouble
            logger.error("a teacher failed:\n%s", self._trouble.rstrip())

    def _give_up_on(self, why: str) -> None:
        import ray

        logger.warning("the main actor of the teacher service is lost: %s", why)
        ray.kill(self._coordinator)
        with self._lock:
            self._coordinator = self._pending = None
            self.account.coordinator_restarts += 1
            # Where they are now is not known; one that has not asked yet must not hold the others.
            self._students = dict.fromkeys(self._students)

    def _report(self) -> None:
        self._reported = time.monotonic()
        self.account.save(self._file)
        self._on_metrics(
            {
                **asdict(self.account.stats()),
                "window_depth": self.status.depth,
                "teachers": len(self.status.teachers),
                **{f"held_seconds/{name}": seconds for name, seconds in self.status.held_s.items()},
            }
        )


def _source(
    coordinator: str,
    student: str,
    num_blocks: int,
    patience_s: float,
    parts: tuple[str, ...],
    own: Callable[[], BlockSource] | None,
    offset: int,
) -> SharedBlocks:
    return SharedBlocks(
        coordinator, student, num_blocks, patience_s, parts, own() if own is not None else None, offset
    )
