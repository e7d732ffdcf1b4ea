"""Keeps one share service alive for a stage, from the driver: places it, watches it, and starts it again elsewhere.

The driver does this itself, not Ray's `max_restarts`: a new actor has to know what was counted and who is still in
play, and where it may go depends on what is free and on which nodes are about to end.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.sharing.account import Account, Stats
from orchestrator.sharing.client import NAMESPACE, SharedBlocks
from orchestrator.sharing.placing import Machine, choose, has_process, machines
from orchestrator.sharing.service import ShareActor, StepTeacher

logger = logging.getLogger("orchestrator")

_PAUSE_S, _LOOK_S = 0.05, 0.5
_FIGURES_EVERY_S = 5.0
# Without an answer: for so long where there seemed to be room, to import and start, and after it had started.
_ROOM_S, _START_S, _SILENCE_S = 15.0, 300.0, 30.0
_MOVE_S = 45.0
_DRAINS_EVERY_S = 2.0


class Keeper:
    """A share service that is there as long as the `with` block lasts, whatever becomes of its actor.

    Args:
        make_teacher: builds the teacher in the actor's process.
        students: who is still to train → the step it begins with; with none, nothing is started.
        num_steps: steps 0 … num_steps-1 exist.
        window: steps held for the slowest student.
        hang_s: after so long without a step a student's group counts as hung; the service stays well below.
        gpus: share of a GPU for the teacher; 0 for a CPU.
        account: file that keeps what was counted, over drivers.
        on_figures: gets the figures every few seconds and at the end.
    """

    def __init__(
        self,
        make_teacher: Callable[[], StepTeacher],
        students: Mapping[str, int],
        num_steps: int,
        *,
        window: int,
        hang_s: float,
        gpus: float,
        account: Path,
        on_figures: Callable[[Stats], None],
    ) -> None:
        self.name = f"share-{uuid.uuid4().hex[:12]}"
        self._make = (make_teacher, num_steps, window)
        self._students: dict[str, int | None] = dict(students)
        self._hang_s, self._gpus, self._file, self._on_figures = hang_s, gpus, account, on_figures
        self.account = Account.load(account)
        self._actor: Any = None
        self._node, self._said, self._trouble = "", "", ""
        self._pending: Any = None
        self._answered, self._room_s = False, _ROOM_S
        self._heard = self._told = self._moved = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keeper", daemon=True)

    def source(self, student: str, num_blocks: int) -> Callable[[], SharedBlocks]:
        """Makes the block source of a student's workers, in a process that Ray knows."""
        return partial(SharedBlocks, self.name, student, num_blocks, 0.8 * self._hang_s)

    def leave(self, student: str) -> None:
        """This student is done, failed or stopped: nobody waits for it any more, whatever actor comes next."""
        with self._lock:
            self._students.pop(student, None)
            if self._actor is not None:
                self._actor.leave.remote(student)

    def __enter__(self) -> Keeper:
        if self._students:
            self._look()
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
        if self._actor is not None:
            try:
                if self._answered:
                    self.account = ray.get(self._actor.status.remote(), timeout=_ROOM_S)["account"]
            except ray.exceptions.RayError as failed:
                logger.warning("the teacher did not say its last figures: %s", type(failed).__name__)
            ray.kill(self._actor)
        self._tell()

    # --- watching ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(_PAUSE_S if self._actor is not None else _LOOK_S):
            try:
                self._look()
            except Exception:
                # The cluster may be in any state; the next look may find it better.
                logger.exception("the teacher could not be looked after")

    def _look(self) -> None:
        if self._actor is None:
            self._place()
            return
        self._hear()
        if self._actor is None:
            self._place()
        elif self._answered:
            self._move_if_leaving()
        if time.monotonic() - self._told > _FIGURES_EVERY_S:
            self._tell()

    def _hear(self) -> None:
        """Ask the actor how it is; one that is gone, or as good as gone, is lost."""
        import ray

        if self._pending is None:
            # It answers after each step: what is not heard of in time is not counted if the actor dies.
            forwarded = self.account.images_forwarded if self._answered else -1
            self._pending = self._actor.status.remote(forwarded)
        ready, _ = ray.wait([self._pending], timeout=_LOOK_S)
        now = time.monotonic()
        if ready:
            pending, self._pending = self._pending, None
            try:
                self._take_in(ray.get(pending))
            except ray.exceptions.RayError as error:
                self._lose(type(error).__name__)
            return
        quiet = now - self._heard
        if self._answered:
            if quiet > _SILENCE_S:
                self._lose(f"it has not answered for {quiet:.0f} s")
        elif quiet > _START_S:
            self._lose(f"it did not start within {quiet:.0f} s")
        elif quiet > self._room_s and not has_process(self._actor._actor_id.hex()):
            # Somebody else was faster, or the machine is slow: twice as long the next time.
            self._room_s *= 2
            self._lose(f"it had no process after {quiet:.0f} s")

    def _take_in(self, status: dict[str, Any]) -> None:
        self.account, self._heard = status["account"], time.monotonic()
        if not self._answered:
            self._answered, self._room_s = True, _ROOM_S
            logger.info("the teacher runs on node %s", self._node[:8])
        if status["trouble"] != self._trouble:
            self._trouble = status["trouble"]
            logger.error("the teacher failed:\n%s", self._trouble.rstrip())
        if status["busy_s"] > self._hang_s / 2:
            self._lose(f"it has been at step {status['step']} for {status['busy_s']:.0f} s")

    def _tell(self) -> None:
        self._told = time.monotonic()
        self.account.save(self._file)
        self._on_figures(self.account.stats())

    # --- placing ----------------------------------------------------------------------------------------------

    def _place(self) -> None:
        """Start an actor where there is a place for it; if there is none, the next look tries again."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        spot = choose(machines(), self._gpus)
        if spot is None:
            self._say("the teacher waits for a machine")
            return
        make_teacher, num_steps, window = self._make
        remote = ray.remote(ShareActor).options(
            name=self.name,
            namespace=NAMESPACE,
            num_cpus=spot.cpus,
            num_gpus=spot.gpus,
            max_restarts=0,
            max_concurrency=1000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(spot.node, soft=False),
        )
        with self._lock:
            try:
                self._actor = remote.remote(
                    make_teacher,
                    dict(self._students),
                    num_steps,
                    window=window,
                    patience_s=self._hang_s / 3,
                    account=self.account,
                )
            except ValueError:
                return  # the name is still that of the actor before
        self._node, self._said = spot.node, ""
        self._heard, self._answered, self._pending = time.monotonic(), False, None
        if not (spot.cpus or spot.gpus):
            logger.warning("no room for the teacher: it shares node %s with the workers there", spot.node[:8])

    def _lose(self, why: str) -> None:
        import ray

        logger.warning("the teacher on node %s is lost: %s", self._node[:8], why)
        ray.kill(self._actor)
        self._forget()

    def _forget(self) -> None:
        with self._lock:
            self._actor = self._pending = None
            if self._answered:
                self.account.restarts += 1
                # Where they are now is not known; one that has not asked yet must not hold the others.
                self._students = dict.fromkeys(self._students)

    def _move_if_leaving(self) -> None:
        """Leave a node that announced its end, between two steps, if another one can take the teacher."""
        import ray

        now = time.monotonic()
        if now - self._moved < _DRAINS_EVERY_S:
            return
        self._moved = now
        there = machines()
        if not any(machine.node == self._node and machine.leaving for machine in there):
            return
        spot = choose(there, self._gpus)
        if spot is None or spot.node == self._node or _leaving(spot.node, there):
            self._say(f"the teacher's node {self._node[:8]} is about to go, and no other can take it")
            return
        logger.warning("the teacher moves from node %s, which is about to go", self._node[:8])
        try:
            self.account = ray.get(self._actor.retire.remote(), timeout=_MOVE_S)
        except ray.exceptions.RayError as error:
            logger.warning("the teacher was gone before it had moved: %s", type(error).__name__)
        ray.kill(self._actor)
        self._forget()
        self._place()

    def _say(self, what: str) -> None:
        if what != self._said:
            self._said = what
            logger.warning("%s", what)


def _leaving(node: str, there: list[Machine]) -> bool:
    return any(machine.node == node and machine.leaving for machine in there)
