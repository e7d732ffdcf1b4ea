"""Supervises one teacher: starts its actor where there is room, watches it, and starts it again elsewhere."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from orchestrator.teacher_service.coordinator import Status
from orchestrator.teacher_service.payload import StepTeacher
from orchestrator.teacher_service.placement import FreeNode, choose, has_process
from orchestrator.teacher_service.teacher_actor import TeacherActor

logger = logging.getLogger("orchestrator")

# Without an answer: for so long where there seemed to be room, to import and start, and after it had started.
_ROOM_S, _START_S, _SILENCE_S = 15.0, 300.0, 30.0
_MOVE_S = 45.0
# What a retired actor has put into the object store lives as long as it does.
_LINGER_S = 20.0
_MACHINES_EVERY_S = 2.0
# Students that have a machine ask sooner than that.
_UNASKED_S = 60.0
# Actors whose own code failed, one after the other with no outputs between: more would fail, too.
_FAILURES = 3


class TeacherSupervisor:
    """Keeps one teacher at work; :meth:`poll` is called again and again and never waits.

    Args:
        coordinator: the coordinator's name.
        make_teacher: builds the teacher in its actor's process.
        num_blocks: blocks of a step.
        gpus: share of a GPU for it; 0 for a CPU.
        stuck_s: seconds at one step after which it is given up.
        patience_s: seconds that the coordinator may be away.
        squeeze: goes beside the workers where nothing is free.
        shards: processes that one teacher is sharded over; the first one answers for all.
        needs: of each student the minimum of workers that it begins with, and the CPUs that each of them reserves.
    """

    def __init__(
        self,
        coordinator: str,
        make_teacher: Callable[[], StepTeacher],
        num_blocks: int,
        *,
        gpus: float,
        stuck_s: float,
        patience_s: float,
        squeeze: bool,
        shards: int = 1,
        needs: Sequence[tuple[int, float]] = ((1, 1.0),),
    ) -> None:
        self._coordinator_name, self._make, self._num_blocks = coordinator, make_teacher, num_blocks
        self._gpus, self._stuck_s, self._patience_s, self._squeeze = gpus, stuck_s, patience_s, squeeze
        self._shards, self._needs = shards, needs
        self.name, self.node = "", ""
        self.finished: Any = None
        self._actor: Any = None
        self._others: list[Any] = []
        self._following: list[Any] = []
        self._ping: Any = None
        self._answered, self._moves, self._room_s = False, False, _ROOM_S
        self._heard = self._checked_at = self._retiring = 0.0
        self._retired: list[tuple[Any, float]] = []
        self._failures, self._forwarded = 0, -1
        self._warned = ""
        self._cpus = 0.0

    @property
    def needs_machines(self) -> bool:
        """Whether it is time to know what the cluster has: it needs a place, or may have to leave its own."""
        return time.monotonic() - self._checked_at > (_MACHINES_EVERY_S if self._actor is not None else 0.0)

    def poll(self, coordinator: Any, status: Status, there: Sequence[FreeNode], *, wanted: bool) -> None:
        """Look after the teacher: start it where there is none, retire it where it is not `wanted` any more."""
        self._release_retired(time.monotonic())
        if self._actor is not None:
            self._poll(coordinator, status)
        if self._actor is None:
            if wanted and there:
                self._fill(coordinator, status, there)
            return
        if self._retiring:
            if time.monotonic() - self._retiring > _MOVE_S:
                self._give_up_on(coordinator, "it did not finish its step before the node's end")
        elif self._answered and not wanted:
            self._retire(coordinator, "it is not needed any more", moves=False)
        elif self._answered and there:
            self._vacate_ending_node(coordinator, there)
            self._make_room(coordinator, status, there)

    def close(self) -> None:
        """End it, and those before it."""
        import ray

        for actor in [self._actor, *self._others, *(actor for actor, _ in self._retired)]:
            if actor is not None:
                ray.kill(actor)

    # --- its teacher --------------------------------------------------------------------------------------------

    def _poll(self, coordinator: Any, status: Status) -> None:
        import ray

        now = time.monotonic()
        refs = [ref for ref in (self.finished, self._ping, *self._following) if ref is not None]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        try:
            if self._ping in ready:
                ray.get(self._ping)
                self._heard = now
                if not self._answered:
                    self._answered, self._room_s = True, _ROOM_S
                    logger.info("a teacher runs on node %s", self.node[:8])
                self._ping = self._actor.idle.remote()
            for follower in self._following:
                if follower in ready:
                    ray.get(follower)  # raises if it did not end well
            if self.finished in ready:
                ray.get(self.finished)
                self._retired.append((self._actor, now))
                self._forget(coordinator, restarts=self._moves)
                return
        except ray.exceptions.RayError as error:
            why = f"{type(error).__name__}: {_last_line(error)}"
            if isinstance(error, ray.exceptions.RayTaskError):
                self._count_failure(coordinator, status, why)
            self._give_up_on(coordinator, why)
            return
        step, busy_s, _ = status.teachers.get(self.name, (None, 0.0, 0.0))
        quiet = now - self._heard
        if busy_s > self._stuck_s:
            self._give_up_on(coordinator, f"it has been at step {step} for {busy_s:.0f} s")
        elif self._answered and quiet > _SILENCE_S:
            self._give_up_on(coordinator, f"it has not answered for {quiet:.0f} s")
        elif not self._answered and quiet > _START_S:
            self._give_up_on(coordinator, f"it did not start within {quiet:.0f} s")
        elif not self._answered and quiet > self._room_s and not has_process(self._actor._actor_id.hex()):
            # Somebody else was faster, or the machine is slow: twice as long the next time.
            self._room_s *= 2
            self._give_up_on(coordinator, f"it had no process after {quiet:.0f} s")

    def _give_up_on(self, coordinator: Any, why: str) -> None:
        import ray

        logger.warning("the teacher on node %s is lost: %s", self.node[:8], why)
        ray.kill(self._actor)
        self._forget(coordinator, restarts=self._answered)

    def _count_failure(self, coordinator: Any, status: Status, why: str) -> None:
        if status.account.images_forwarded != self._forwarded:
            self._failures, self._forwarded = 0, status.account.images_forwarded
        self._failures += 1
        if self._failures >= _FAILURES:
            coordinator.give_up.remote(
                f"the teacher failed {self._failures} times before its first output: {why}"
            )

    def _forget(self, coordinator: Any, restarts: bool) -> None:
        import ray

        coordinator.forget.remote(self.name, restarts)
        for actor in self._others:
            ray.kill(actor)
        self._actor = self.finished = self._ping = None
        self._others, self._following = [], []
        self._retiring = 0.0

    def _retire(self, coordinator: Any, why: str, moves: bool) -> None:
        self._moves = moves
        logger.info("the teacher on node %s ends after its step: %s", self.node[:8], why)
        self._retiring = time.monotonic()
        coordinator.retire.remote(self.name)

    def _release_retired(self, now: float) -> None:
        import ray

        for actor, since in self._retired:
            if now - since > _LINGER_S:
                ray.kill(actor)
        self._retired = [(actor, since) for actor, since in self._retired if now - since <= _LINGER_S]

    # --- its node -----------------------------------------------------------------------------------------------

    def _fill(self, coordinator: Any, status: Status, there: Sequence[FreeNode]) -> None:
        """Start an actor on a node with room for it; if there is none, the next poll tries again."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._checked_at = time.monotonic()
        placement = choose(there, self._gpus, self._shards)
        if placement is not None and status.unasked_s > _UNASKED_S:
            # The room is for the students: see `_make_room`.
            placement = replace(placement, cpus=0.0)
        if placement is None or not (self._squeeze or placement.cpus or placement.gpus):
            self._warn_once("a teacher waits for a machine")
            return
        self.name, self.node, self._warned = uuid.uuid4().hex[:12], placement.node, ""
        self._cpus = placement.cpus
        remote = ray.remote(TeacherActor).options(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            runtime_env={"env_vars": dict(placement.environment)} if placement.environment else None,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(placement.node, soft=False),
        )
        arguments = (self._coordinator_name, self._make, self._num_blocks, self._patience_s)
        self._actor = remote.remote(self.name, *arguments)
        if self._shards > 1:
            port = self._actor.listen.remote(self._shards)
            self._others = [
                remote.remote(f"{self.name}.{rank}", *arguments) for rank in range(1, self._shards)
            ]
            self._following = [
                other.follow.remote(rank, self._shards, port) for rank, other in enumerate(self._others, 1)
            ]
            self.finished = self._actor.lead.remote(self._shards, port)
        else:
            self.finished = self._actor.work.remote()
        self._ping = self._actor.idle.remote()
        self._heard, self._answered = time.monotonic(), False
        if not (placement.cpus or placement.gpus):
            logger.warning(
                "no room for a teacher: it shares node %s with the workers there", placement.node[:8]
            )

    def _vacate_ending_node(self, coordinator: Any, there: Sequence[FreeNode]) -> None:
        """Leave a node that announced its end, between two steps, if another node has room for the teacher."""
        self._checked_at = time.monotonic()
        leaving = {machine.node for machine in there if machine.leaving}
        if self.node not in leaving:
            return
        placement = choose(there, self._gpus, self._shards)
        if placement is None or placement.node in leaving:
            self._warn_once(
                f"a teacher's node {self.node[:8]} is about to be lost, and no other node has room for it"
            )
            return
        self._retire(coordinator, "its node is about to be lost", moves=True)

    def _make_room(self, coordinator: Any, status: Status, there: Sequence[FreeNode]) -> None:
        """Give the place of a teacher on a CPU to students that have none: with neither at work nothing goes on.

        A teacher that started before the first student had its machine may have taken the last one. Of GPUs each
        teacher and student has a share, so the one does not take the place of the other.
        """
        if self._retiring or not self._cpus or status.unasked_s <= _UNASKED_S:
            return
        free = [machine.free_cpus for machine in there if not machine.leaving]
        # One that has its machines asks, and then there is time.
        if not any(sum(int(cpus / each + 1e-6) for cpus in free) >= least for least, each in self._needs):
            self._retire(coordinator, "students wait for the machine that it has", moves=True)

    def _warn_once(self, what: str) -> None:
        if what != self._warned:
            self._warned = what
            logger.warning("%s since %s; still searching", what, time.strftime("%H:%M:%S"))


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].strip()
