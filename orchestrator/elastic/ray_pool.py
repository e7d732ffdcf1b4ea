"""The worker pool on a Ray cluster: each slot is an actor, kept warm and handed from attempt to attempt.

`worker_pool.py` has the rules; this makes the actors that the rules ask for and hears of those that are gone. A slot
for which there is no machine yet stays a pending actor, which is what makes an autoscaler add one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata

from orchestrator.elastic.nodes import draining_nodes
from orchestrator.elastic.resources import SlotShape
from orchestrator.elastic.worker_pool import Demand, Slot, SlotState, WorkerPool
from orchestrator.elastic.worker_slot import WorkerSlot

logger = logging.getLogger("orchestrator")

# How long a slot's answer to "are you there" is held back, and so how often each is asked.
_ALIVE_S = 5.0
# What a slot may take to import torch and DeepSpeed on a machine that is busy with other things.
_START_S = 300.0
_DRAIN_POLL_S = 0.5
# How soon a cluster that does not answer is asked again.
_BACKOFF_S = 2.0
# The longest pause between slots that end before they are ready.
_PAUSE_S = 30.0


@dataclass
class SlotActor:
    """A slot's actor.

    Attributes:
        slot: what the pool knows of it.
        actor: its handle.
        metadata: where it runs and what it was given; None until it is placed.
        heard: when it last answered, on the monotonic clock.
        call: the one call that is always pending, and what it asks.
    """

    slot: Slot[SlotShape]
    actor: Any
    metadata: ActorMetadata | None = None
    heard: float = 0.0
    call: tuple[str, Any] | None = None


class RayWorkerPool:
    """All slots of one pipeline on a Ray cluster. Thread-safe; every run's controller drives it by calling `poll`.

    Args:
        preload: modules that fork servers import before the first attempt.
        heartbeat_timeout_s: a slot that has not answered for so long is given up.

    Attributes:
        rules: which job has which slots.
        lock: of the rules.
        trouble: why slots do not come up; empty if they do.
    """

    def __init__(
        self,
        preload: Sequence[str] = (),
        heartbeat_timeout_s: float = 15.0,
    ) -> None:
        self._preload = tuple(preload)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self.rules: WorkerPool[SlotShape] = WorkerPool()
        self._actors: dict[str, SlotActor] = {}
        self._draining: dict[str, int] = {}
        self._drains_polled = 0.0
        self._drains_unknown = False
        self._waiting: list[Slot[SlotShape]] = []
        self._paused_until = 0.0
        self._failed_starts = 0
        self.trouble = ""
        self.lock = threading.RLock()

    # --- what runs do -----------------------------------------------------------------------------------------

    def request(self, job: str, min_workers: int, max_workers: int, shape: SlotShape) -> None:
        """`job` would use up to `max_workers` slots; those it lacks are asked for."""
        with self.lock:
            self._start(self.rules.request(job, Demand(min_workers, max_workers, shape)))

    def prestart(self, number: int, shape: SlotShape) -> None:
        """Start slots before a job asks for them."""
        with self.lock:
            self._start(self.rules.prestart(number, shape))

    def withdraw(self, job: str) -> None:
        """`job` needs no slots any more; its slots stay warm for the next one."""
        with self.lock:
            self._stop(self.rules.withdraw(job, time.monotonic()))

    def acquire(self, job: str, names: Sequence[str]) -> list[SlotActor] | None:
        """The slots `names`, for `job` alone; None if one of them is not free any more."""
        with self.lock:
            slots = self.rules.acquire(job, names, time.monotonic())
            return None if slots is None else [self._actors[slot.name] for slot in slots]

    def is_draining(self, node: str) -> bool:
        """Whether the node has announced its end."""
        return node in self._draining

    def set_unresponsive(self, names: Iterable[str]) -> None:
        """These slots did not answer just now: no group gets them until they do, or until they are given up."""
        with self.lock:
            for name in names:
                if name in self._actors:
                    self._actors[name].slot.unresponsive = True
                    self._call_again(self._actors[name])

    def lose(self, names: Iterable[str], why: str) -> None:
        """These slots are gone: forget them, and ask for others."""
        with self.lock:
            lost = [name for name in names if name in self._actors]
            for name in lost:
                node = self._actors[name].slot.node
                logger.info("%s on node %s is lost: %s", name, node[:8] or "?", why)
            replacements = self.rules.lose(lost)
            self._kill(lost)
            self._start(replacements)

    def snapshot(self) -> list[dict[str, Any]]:
        """What is known of each slot, for people and tests."""
        with self.lock:
            return [
                {
                    "name": name,
                    "state": held.slot.state.value,
                    "node": held.slot.node,
                    "job": held.slot.job,
                    "leaving": held.slot.leaving,
                    "unresponsive": held.slot.unresponsive,
                    "pid": held.metadata.pid if held.metadata is not None else None,
                }
                for name, held in self._actors.items()
            ]

    def drop_idle(self) -> None:
        """Stop the slots that no job has, so that what they hold is free for something else."""
        with self.lock:
            self._stop(self.rules.drop_idle())

    def close(self) -> None:
        """Kill all slots."""
        with self.lock:
            self._kill(list(self._actors))

    # --- what happens -----------------------------------------------------------------------------------------

    def poll(self, timeout: float) -> None:
        """Take in what became of slots and nodes; waits at most `timeout` seconds for news."""
        import ray

        with self.lock:
            refs = {self._pending(held): held for held in self._actors.values()}
        if refs:
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=timeout)
            if ready:
                ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        else:
            time.sleep(timeout)
            ready = []
        self._poll_drains()
        with self.lock:
            for ref in ready:
                self._apply_answer(refs[ref], ref)
            self._start(self.rules.drain(self._draining))
            self._find_silent()
            self._stop(self.rules.expire(time.monotonic()))
            self._start([])

    def _pending(self, held: SlotActor) -> Any:
        if held.call is None:
            what = {SlotState.REQUESTED: "get_metadata", SlotState.STARTING: "warm"}.get(
                held.slot.state, "alive"
            )
            method = getattr(held.actor, what)
            held.call = (what, method.remote(_ALIVE_S) if what == "alive" else method.remote())
        return held.call[1]

    def _call_again(self, held: SlotActor) -> None:
        if held.call is not None and held.call[0] == "alive":
            held.call = ("alive", held.actor.alive.remote(0.0))

    def _apply_answer(self, held: SlotActor, ref: Any) -> None:
        import ray

        if held.call is None or held.call[1] != ref or held.slot.state is SlotState.LOST:
            return  # another run's controller was faster
        what, held.call = held.call[0], None
        now = time.monotonic()
        try:
            answer = ray.get(ref, timeout=_ALIVE_S)
        except ray.exceptions.RayError as error:
            if what == "warm":
                self._did_not_start(error)
            self.lose([held.slot.name], type(error).__name__)
            return
        held.heard, held.slot.unresponsive = now, False
        if what == "get_metadata":
            held.metadata = answer
            draining = answer.node_id in self._draining
            self._start(self.rules.placed(held.slot.name, answer.node_id, draining=draining))
        elif what == "warm":
            self.rules.ready(held.slot.name, now)
            self._failed_starts, self.trouble = 0, ""

    def _did_not_start(self, error: Exception) -> None:
        """One that dies while it imports is likely to do so again: pause, and say why."""
        self._failed_starts += 1
        cause = next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), "")
        if self._failed_starts > 1:
            self._paused_until = time.monotonic() + min(_PAUSE_S, 2.0**self._failed_starts)
            self.trouble = (
                f"{self._failed_starts} slots in a row ended before they were ready: {cause.strip()}"
            )

    def _poll_drains(self) -> None:
        """Ask which nodes announced their end; not under the lock, since a head that is away answers late."""
        now = time.monotonic()
        if now < self._drains_polled:
            return
        self._drains_polled = now + _DRAIN_POLL_S
        try:
            self._draining = draining_nodes()
        except Exception as error:  # Ray's state client raises what its RPC library does
            if not self._drains_unknown:
                logger.warning(
                    "the cluster has not reported its draining nodes since %s: %s; retrying every %.0f s, and "
                    "workers stay where they are",
                    time.strftime("%H:%M:%S"),
                    error,
                    _BACKOFF_S,
                )
            self._drains_unknown = True
            self._drains_polled = now + _BACKOFF_S
        else:
            self._drains_unknown = False

    def _find_silent(self) -> None:
        now = time.monotonic()
        limits = {
            SlotState.READY: self._heartbeat_timeout_s + _ALIVE_S,
            # One whose imports hang would count as about to be ready for ever.
            SlotState.STARTING: _START_S,
        }
        silent = [
            name
            for name, held in self._actors.items()
            if now - held.heard > limits.get(held.slot.state, float("inf"))
        ]
        for name in silent:
            self.lose([name], f"no answer for {now - self._actors[name].heard:.0f} s")

    # --- actors -----------------------------------------------------------------------------------------------

    def _start(self, slots: list[Slot[SlotShape]]) -> None:
        """Make the actors of these slots, at once or, while none comes up, after a pause."""
        import ray

        if time.monotonic() < self._paused_until:
            self._waiting += slots
            return
        slots, self._waiting = self._waiting + slots, []
        for slot in slots:
            if slot.state is SlotState.LOST:
                continue
            remote = ray.remote(WorkerSlot).options(
                max_concurrency=8, max_restarts=0, **slot.shape.ray_options()
            )
            actor = remote.remote(self._preload)
            self._actors[slot.name] = SlotActor(slot, actor, heard=time.monotonic())

    def _stop(self, slots: list[Slot[SlotShape]]) -> None:
        self._kill([slot.name for slot in slots])

    def _kill(self, names: Iterable[str]) -> None:
        import ray

        for name in names:
            # Another controller may be waiting for an answer of this slot right now, and finds it LOST.
            held = self._actors.pop(name, None)
            if held is not None:
                ray.kill(held.actor)
