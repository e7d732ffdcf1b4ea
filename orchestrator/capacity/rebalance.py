"""Keeps the split of a running distillation true to the cluster: computed anew when machines come or go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from orchestrator.capacity.allocate import DeviceSplit, StudentCost, TeacherCost, split
from orchestrator.errors import UserError

logger = logging.getLogger("orchestrator")

_CHECK_S = 1.0
# A new split restarts groups: a little is not worth that.
_GAIN = 0.05


class Balancer:
    """Workers by student and the number of teacher actors, for the devices that there are now. Thread-safe.

    A new split is taken on when a student left, when devices are too few for the present one, or when it is 5 %
    faster. Losing machines never makes it raise: with too few for all, every student may have its minimum, and who gets
    a slot is for the worker pool to say.

    Args:
        teacher: measured cost of the teacher.
        students: measured costs of those that have steps to do.
        devices: how many there are now, such as :func:`cluster_devices`; asked at most once a second.
        share: whether processes may share a device; see :func:`orchestrator.capacity.allocate.split`.
    """

    def __init__(
        self,
        teacher: TeacherCost,
        students: Sequence[StudentCost],
        devices: Callable[[], float],
        *,
        share: bool = False,
    ) -> None:
        self._teacher, self._devices, self._share = teacher, devices, share
        self._students = {student.name: student for student in students}
        self._min_workers = {student.name: student.min_workers for student in students}
        self._split: DeviceSplit | None = None
        self._known: tuple[float, tuple[str, ...]] | None = None
        self._checked_at = float("-inf")
        self._lock = threading.Lock()

    def quota(self, student: str) -> Callable[[], tuple[int, int]]:
        """Says the minimum and maximum of workers of a student just now: the `limit` of its job."""
        return partial(self._quota, student)

    def teachers(self) -> int:
        """How many teacher actors there should be now."""
        with self._lock:
            self._check()
            return self._split.teachers if self._split is not None else 1

    def deregister(self, student: str) -> None:
        """This student is done, failed or stopped: the others may have its devices."""
        with self._lock:
            self._students.pop(student, None)
            self._checked_at = float("-inf")

    @property
    def split(self) -> DeviceSplit | None:
        """The split in force; None while there are too few devices for all."""
        with self._lock:
            self._check()
            return self._split

    def _quota(self, student: str) -> tuple[int, int]:
        with self._lock:
            self._check()
            min_workers = self._min_workers[student]
            workers = self._split.workers if self._split is not None else {}
            return min_workers, max(min_workers, workers.get(student, min_workers))

    def _check(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < _CHECK_S or not self._students:
            return
        self._checked_at = now
        known = (self._devices(), tuple(self._students))
        if known == self._known:
            return
        changed = self._known is None or known[1] != self._known[1]
        self._known = known
        devices = known[0]
        try:
            found = split(self._teacher, list(self._students.values()), devices, share=self._share)
        except UserError as error:
            self._split = None
            logger.warning("no split for now: %s", error.what)
            return
        if changed or self._split is None or not _fits(self._split, devices) or _faster(found, self._split):
            self._split = found
            logger.info("split of %s", described(found))


def described(split: DeviceSplit) -> str:
    """One line for a log."""
    workers = ", ".join(f"{name} {number}" for name, number in split.workers.items())
    return f"{split.devices:g} devices: teacher {split.teachers}, {workers}; {split.step_s:.3g} s a step"


def cluster_devices(kind: Literal["cpu", "gpu"]) -> float:
    """Devices of the connected cluster's living nodes that have not announced their end.

    GPUs, or else CPUs. On the driver's own machine at most as many as it has cores: a cluster of its own offers
    more places than that.
    """
    import os

    import ray

    from orchestrator.elastic.nodes import draining_nodes

    leaving = draining_nodes()
    own = ray.get_runtime_context().get_node_id()
    total = 0.0
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] in leaving:
            continue
        found = float(node["Resources"].get("GPU" if kind == "gpu" else "CPU", 0.0))
        if kind == "cpu" and node["NodeID"] == own:
            found = min(found, float(os.cpu_count() or 1))
        total += found
    return total


def _fits(split: DeviceSplit, devices: float) -> bool:
    return split.used <= devices if not split.shared else split.devices <= devices


def _faster(found: DeviceSplit, present: DeviceSplit) -> bool:
    return found.step_s < present.step_s * (1 - _GAIN)
