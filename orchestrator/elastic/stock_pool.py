"""The pool's rules for `workers_from: stock`: a slot is room on a node, and Ray Train makes the actors itself.

It is the way out when Ray Train's internals have moved under the warm slots, and the other arm of `bench recover`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.elastic.nodes import draining_nodes
from orchestrator.elastic.ray_pool import SlotActor
from orchestrator.elastic.resources import Node, SlotShape, cluster_nodes, slots_on
from orchestrator.elastic.worker_pool import Demand, Slot, SlotState, WorkerPool

logger = logging.getLogger("orchestrator")

_POLL_S = 0.5
# Ray counts a node as alive for so long after its machine is gone.
_SUSPECT_S = 30.0


class StockPool:
    """Room for workers on a Ray cluster's nodes; see :class:`ray_pool.RayWorkerPool`, whose methods it has."""

    trouble = ""

    def __init__(self) -> None:
        self.rules: WorkerPool[SlotShape] = WorkerPool()
        self.lock = threading.RLock()
        self._draining: dict[str, int] = {}
        self._suspects: dict[str, float] = {}
        self._polled = 0.0

    def request(self, job: str, min_workers: int, max_workers: int, shape: SlotShape) -> None:
        """`job` would use up to `max_workers` workers."""
        with self.lock:
            self.rules.request(job, Demand(min_workers, max_workers, shape))
            self._polled = 0.0

    def withdraw(self, job: str) -> None:
        """`job` needs no room any more."""
        with self.lock:
            self.rules.withdraw(job, time.monotonic())
            # Room that is not a job's is free for slots of any shape.
            self.rules.lose([slot.name for slot in self.rules.slots.values() if slot.job is None])

    def acquire(self, job: str, names: Sequence[str]) -> list[SlotActor] | None:
        """The slots `names`, for `job` alone; None if one of them is not free any more."""
        with self.lock:
            slots = self.rules.acquire(job, names, time.monotonic())
            return None if slots is None else [SlotActor(slot, None) for slot in slots]

    def is_draining(self, node: str) -> bool:
        """Whether the node has announced its end."""
        return node in self._draining

    def suspect(self, nodes: Iterable[str]) -> None:
        """These nodes did not answer."""
        with self.lock:
            self._suspects |= dict.fromkeys(nodes, time.monotonic())
            self._polled = 0.0

    def snapshot(self) -> list[dict[str, Any]]:
        """What is known of each slot, for people and tests."""
        with self.lock:
            return [
                {"name": slot.name, "state": slot.state.value, "node": slot.node, "job": slot.job}
                for slot in self.rules.slots.values()
            ]

    def poll(self, timeout: float) -> None:
        """Take in which nodes are there; waits `timeout` seconds where there is nothing new."""
        time.sleep(timeout)
        now = time.monotonic()
        with self.lock:
            if now - self._polled < _POLL_S:
                return
            self._polled = now
            try:
                self._draining, nodes = draining_nodes(), cluster_nodes()
            except Exception as error:  # Ray's state client raises what its RPC library does
                logger.warning("the cluster does not report its nodes: %s", error)
                return
            self._suspects = {n: at for n, at in self._suspects.items() if now - at < _SUSPECT_S}
            self.rules.drain(self._draining)
            self._match({node.name: node for node in nodes if node.name not in self._suspects}, now)

    def _match(self, nodes: Mapping[str, Node], now: float) -> None:
        """Make the pool's slots those that the nodes have room for."""
        gone = [
            slot.name
            for slot in self.rules.slots.values()
            if slot.state is not SlotState.REQUESTED
            and slot.node not in nodes
            and slot.node not in self._draining
        ]
        self.rules.lose(gone)
        waiting = [slot for slot in self.rules.slots.values() if slot.state is SlotState.REQUESTED]
        for node in nodes.values():
            if node.name in self._draining:
                continue
            used = [slot for slot in self.rules.slots.values() if slot.node == node.name]
            while waiting and len(used) < slots_on(waiting[0].shape, node):
                slot: Slot[SlotShape] = waiting.pop(0)
                self.rules.placed(slot.name, node.name)
                self.rules.ready(slot.name, now)
                used.append(slot)
