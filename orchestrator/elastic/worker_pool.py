"""Which job has which worker slots: the rules of the pool, without Ray, processes or a clock.

`ray_pool.py` drives these rules with Ray actors, and `orchestrator simulate` drives them with the machines of a
trace, so a simulation decides as a cluster does. Times are seconds on any clock that the caller sticks to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

# Slots that no job has used for so long are given back to the cluster.
IDLE_S = 30.0

Shape = TypeVar("Shape")


class SlotState(Enum):
    """Where a slot is in its life."""

    REQUESTED = "requested"  # asked for; there may be no machine for it yet
    STARTING = "starting"  # on a machine, and importing what a worker needs
    READY = "ready"  # can take a worker
    LOST = "lost"  # gone; no part of the pool any more


@dataclass(eq=False)
class Slot(Generic[Shape]):
    """A place for one worker.

    Attributes:
        name: unique in its pool.
        shape: the resources that it holds; slots of one shape can replace each other.
        state: see :class:`SlotState`.
        node: the machine that it is on; empty until it is placed.
        job: the job that works on it.
        draining: its node has announced its end.
        reclaimed: a job below its minimum needs it more than the one that has it.
        unresponsive: it has not answered lately. It may only be slow, so it is kept, but not handed out.
        idle_since: when it was last released.
    """

    name: str
    shape: Shape
    state: SlotState = SlotState.REQUESTED
    node: str = ""
    job: str | None = None
    draining: bool = False
    reclaimed: bool = False
    unresponsive: bool = False
    idle_since: float = 0.0

    @property
    def leaving(self) -> bool:
        """Whether a worker group should do without it."""
        return self.draining or self.reclaimed


@dataclass(frozen=True)
class Demand(Generic[Shape]):
    """How many workers a job wants at least and at most."""

    min_workers: int
    max_workers: int
    shape: Shape


@dataclass
class WorkerPool(Generic[Shape]):
    """All slots of one pipeline, and who has them.

    Jobs request slots and acquire those that are ready; nothing here waits. Methods that change how many slots
    there should be return the slots that the caller has to start or to stop.

    Attributes:
        num_reclaimed: how often a slot was reclaimed so far; when it grows, jobs that decided before have news.
    """

    slots: dict[str, Slot[Shape]] = field(default_factory=dict)
    demands: dict[str, Demand[Shape]] = field(default_factory=dict)
    num_reclaimed: int = 0
    _of_job: dict[str | None, dict[str, Slot[Shape]]] = field(default_factory=lambda: {None: {}})
    _made: int = 0

    # --- what jobs do -----------------------------------------------------------------------------------------

    def request(self, job: str, demand: Demand[Shape]) -> list[Slot[Shape]]:
        """`job` would use up to `demand.max_workers` slots; returns the ones to start for it."""
        self.demands[job] = demand
        return self._missing(demand.shape)

    def prestart(self, number: int, shape: Shape) -> list[Slot[Shape]]:
        """Slots to start before a job asks for them."""
        return [self._new(shape) for _ in range(number)]

    def withdraw(self, job: str, now: float) -> list[Slot[Shape]]:
        """`job` needs no slots any more. Those that are ready stay for the next job; returns the ones to stop."""
        demand = self.demands.pop(job, None)
        self.release(job, now)
        if demand is None:
            return []
        of_shape = [slot for slot in self.slots.values() if slot.shape == demand.shape]
        surplus = len(of_shape) - self._wanted(demand.shape)
        requested = [slot for slot in of_shape if slot.state is SlotState.REQUESTED]
        return self._removed(requested[: max(0, surplus)])

    def available(self, job: str) -> list[Slot[Shape]]:
        """Ready slots that `job` has or may acquire, its own first.

        What other jobs lack of their minimum is left for them. A job that lacks some of its own minimum reclaims
        slots of jobs that are above theirs.
        """
        demand = self.demands[job]
        mine = list(self._of_job.get(job, {}).values())
        idle = [slot for slot in self._of_job[None].values() if self._is_free(slot, demand.shape)]
        if len(self.demands) == 1:
            return mine + idle
        owed = sum(
            max(0, other.min_workers - len(self._of_job.get(name, {})))
            for name, other in self.demands.items()
            if name != job and other.shape == demand.shape
        )
        # A job without any slot leaves others theirs, too: two that each took all would take turns for ever.
        lacking = max(0, demand.min_workers - len(mine))
        free = max(min(lacking, len(idle)), len(idle) - owed)
        self._reclaim(job, demand, len(mine) + free)
        return mine + idle[:free]

    def starting(self, job: str) -> int:
        """How many slots that `job` could use will be ready in a few seconds."""
        shape = self.demands[job].shape
        return sum(
            slot.state is SlotState.STARTING and slot.shape == shape and not slot.draining
            for slot in self.slots.values()
        )

    def acquire(self, job: str, names: Sequence[str], now: float) -> list[Slot[Shape]] | None:
        """Give `job` these slots and release all others that it has; None if one of them is not free any more."""
        found = [self.slots.get(name) for name in names]
        slots = [slot for slot in found if slot is not None]
        if len(slots) < len(names) or any(
            slot.state is not SlotState.READY or slot.job not in (None, job) for slot in slots
        ):
            return None
        self.release(job, now)
        for slot in slots:
            self._assign(slot, job)
        return slots

    def release(self, job: str, now: float) -> None:
        """Nobody works on the slots of `job` any more."""
        for slot in list(self._of_job.get(job, {}).values()):
            slot.reclaimed, slot.idle_since = False, now
            self._assign(slot, None)

    # --- what happens to slots --------------------------------------------------------------------------------

    def placed(self, name: str, node: str, *, draining: bool = False) -> None:
        """The slot is on a machine, and starts."""
        slot = self.slots[name]
        slot.node, slot.state, slot.draining = node, SlotState.STARTING, draining

    def ready(self, name: str, now: float) -> None:
        """The slot can take a worker."""
        slot = self.slots[name]
        slot.state, slot.idle_since = SlotState.READY, now

    def lose(self, names: Iterable[str]) -> list[Slot[Shape]]:
        """These slots are gone; returns the ones to start in their place."""
        lost = [self.slots[name] for name in names if name in self.slots]
        self._removed(lost)
        return [new for shape in dict.fromkeys(slot.shape for slot in lost) for new in self._missing(shape)]

    def drain(self, nodes: Iterable[str]) -> list[Slot[Shape]]:
        """These nodes announced their end; returns the slots to start elsewhere meanwhile."""
        gone = set(nodes)
        noticed = [slot for slot in self.slots.values() if slot.node in gone and not slot.draining]
        for slot in noticed:
            slot.draining = True
        shapes = dict.fromkeys(slot.shape for slot in noticed)
        return [new for shape in shapes for new in self._missing(shape)]

    def expire(self, now: float) -> list[Slot[Shape]]:
        """Slots to stop because no job has wanted any for a while."""
        if self.demands:
            return []
        return self._removed(
            [
                slot
                for slot in self.slots.values()
                if slot.state is SlotState.READY and now - slot.idle_since > IDLE_S
            ]
        )

    # --- within -----------------------------------------------------------------------------------------------

    def _wanted(self, shape: Shape) -> int:
        return sum(demand.max_workers for demand in self.demands.values() if demand.shape == shape)

    def _missing(self, shape: Shape) -> list[Slot[Shape]]:
        """As many slots as the jobs want in all; one on a node that is about to go needs a replacement."""
        there = sum(slot.shape == shape and not slot.draining for slot in self.slots.values())
        return [self._new(shape) for _ in range(self._wanted(shape) - there)]

    def _new(self, shape: Shape) -> Slot[Shape]:
        self._made += 1
        slot = Slot(f"slot-{self._made}", shape)
        self.slots[slot.name] = self._of_job[None][slot.name] = slot
        return slot

    def _removed(self, slots: list[Slot[Shape]]) -> list[Slot[Shape]]:
        for slot in slots:
            slot.state = SlotState.LOST
            del self.slots[slot.name]
            del self._of_job[slot.job][slot.name]
        return slots

    def _assign(self, slot: Slot[Shape], job: str | None) -> None:
        del self._of_job[slot.job][slot.name]
        slot.job = job
        self._of_job.setdefault(job, {})[slot.name] = slot

    @staticmethod
    def _is_free(slot: Slot[Shape], shape: Shape) -> bool:
        return slot.state is SlotState.READY and slot.shape == shape and not slot.unresponsive

    def _reclaim(self, job: str, demand: Demand[Shape], has: int) -> None:
        """Mark what others have above their minimum, until `job` will have its own."""
        missing = demand.min_workers - has
        for name, other in self.demands.items():
            if name == job or other.shape != demand.shape:
                continue
            slots = list(self._of_job.get(name, {}).values())
            staying = [slot for slot in slots if not slot.leaving]
            spare = len(staying) - other.min_workers
            missing -= sum(slot.reclaimed for slot in slots)
            for slot in staying[: max(0, min(spare, missing))]:
                slot.reclaimed = True
                self.num_reclaimed += 1
                missing -= 1
