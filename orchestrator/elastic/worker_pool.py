"""Which job has which worker slots: the rules of the pool, without Ray, processes or a clock.

`ray_pool.py` drives these rules with Ray actors, and `orchestrator simulate` drives them with the machines of a
trace, so a simulation decides as a cluster does. Times are seconds on any clock that the caller sticks to.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Generic, TypeVar

# Slots that no job has used for so long are given back to the cluster.
IDLE_S = 30.0

Shape = TypeVar("Shape", bound=Hashable)
_NUMBER = attrgetter("number")


class SlotState(Enum):
    """Where a slot is in its life."""

    REQUESTED = "requested"  # asked for; there may be no machine for it yet
    STARTING = "starting"  # on a machine, and importing what a worker needs
    READY = "ready"  # can take a worker
    LOST = "lost"  # gone; no part of the pool any more


@dataclass(eq=False)
class Slot(Generic[Shape]):
    """A place for one worker. Only the pool changes it, but for `unresponsive`.

    Attributes:
        name: unique in its pool.
        shape: the resources that it holds; slots of one shape can replace each other.
        number: how many slots the pool had made before it.
        state: see :class:`SlotState`.
        node: the machine that it is on; empty until it is placed.
        job: the job that works on it, or that did when it was lost.
        draining: its node has announced its end.
        reclaimed: a job below its minimum needs it more than the one that has it.
        leaving: a worker group should do without it: it is draining or reclaimed.
        unresponsive: it has not answered lately. It may only be slow, so it is kept, but not handed out.
        idle_since: when it was last released.
    """

    name: str
    shape: Shape
    number: int = 0
    state: SlotState = SlotState.REQUESTED
    node: str = ""
    job: str | None = None
    draining: bool = False
    reclaimed: bool = False
    leaving: bool = False
    unresponsive: bool = False
    idle_since: float = 0.0

    def mark(self, *, draining: bool | None = None, reclaimed: bool | None = None) -> None:
        """Set why a worker group should do without it."""
        self.draining = self.draining if draining is None else draining
        self.reclaimed = self.reclaimed if reclaimed is None else reclaimed
        # Kept, not computed: each decision of a job reads it of every slot that the job has.
        self.leaving = self.draining or self.reclaimed


@dataclass(frozen=True)
class Demand(Generic[Shape]):
    """How many workers a job wants at least and at most."""

    min_workers: int
    max_workers: int
    shape: Shape


@dataclass
class _Counts:
    """How many slots of a shape there are, without those that are draining, and how many of them start."""

    staying: int = 0
    starting: int = 0


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
    _made: int = 0
    # What is asked at each decision is kept by what it is asked by.
    _of_job: dict[str, dict[str, Slot[Shape]]] = field(default_factory=dict)
    _idle: dict[Shape, dict[str, Slot[Shape]]] = field(default_factory=dict)  # ready, and no job's
    _on_node: dict[str, dict[str, Slot[Shape]]] = field(default_factory=dict)
    _counts: dict[Shape, _Counts] = field(default_factory=dict)

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
        # One on a node that is about to go is not surplus, nor is the one that was requested in its place.
        surplus = self._count(demand.shape).staying - self._demanded(demand.shape)
        if surplus <= 0:
            return []
        requested = [
            slot
            for slot in self.slots.values()
            if slot.state is SlotState.REQUESTED and slot.shape == demand.shape
        ]
        return self._removed(requested[-surplus:])

    def available(self, job: str) -> list[Slot[Shape]]:
        """Ready slots that `job` has or may acquire, its own first, the others in the order they were made.

        What other jobs lack of their minimum is left for them. A job that lacks some of its own minimum reclaims
        slots of jobs that are above theirs.
        """
        demand = self.demands[job]
        mine = list(self._of_job.get(job, {}).values())
        # A slot on a draining node would soon end the group that starts on it.
        ready = self._idle.get(demand.shape, {}).values()
        idle = [slot for slot in ready if not slot.draining and not slot.unresponsive]
        idle.sort(key=_NUMBER)
        others = {
            name: other for name, other in self.demands.items() if name != job and other.shape == demand.shape
        }
        if not others:
            return mine + idle
        staying = {name: self._staying(name) for name in others}
        owed = sum(max(0, other.min_workers - len(staying[name])) for name, other in others.items())
        # A job without any slot leaves others theirs, too: two that each took all would take turns for ever.
        lacking = max(0, demand.min_workers - sum(not slot.leaving for slot in mine))
        free = max(min(lacking, len(idle)), len(idle) - owed)
        if lacking > free:
            spare = [slot for name, other in others.items() for slot in staying[name][other.min_workers :]]
            self._reclaim(lacking - free - self.starting(job) - self._num_reclaimed(others), spare)
        return mine + idle[:free]

    def starting(self, job: str) -> int:
        """How many slots that `job` could use will be ready in a few seconds."""
        return self._count(self.demands[job].shape).starting

    def acquire(self, job: str, names: Sequence[str], now: float) -> list[Slot[Shape]] | None:
        """Give `job` these slots and release all others that it has; None if one of them is not free any more."""
        found = [self.slots.get(name) for name in names]
        slots = [slot for slot in found if slot is not None]
        if len(slots) < len(names) or any(
            slot.state is not SlotState.READY or slot.job not in (None, job) for slot in slots
        ):
            return None
        self.release(job, now)
        held = self._of_job.setdefault(job, {})
        for slot in slots:
            del self._idle[slot.shape][slot.name]
            slot.job = job
            held[slot.name] = slot
        return slots

    def release(self, job: str, now: float) -> None:
        """Nobody works on the slots of `job` any more."""
        for slot in self._of_job.pop(job, {}).values():
            slot.mark(reclaimed=False)
            slot.job, slot.idle_since = None, now
            self._idle.setdefault(slot.shape, {})[slot.name] = slot

    # --- what happens to slots --------------------------------------------------------------------------------

    def placed(self, name: str, node: str, *, draining: bool = False) -> list[Slot[Shape]]:
        """The slot is on a machine, and starts; returns the ones to start in its place if the node is draining."""
        slot = self.slots[name]
        self._on_node.setdefault(node, {})[name] = slot
        slot.node = node
        self._change(slot, SlotState.STARTING, draining=draining)
        return self._missing(slot.shape) if draining else []

    def ready(self, name: str, now: float) -> None:
        """The slot can take a worker."""
        slot = self.slots[name]
        self._change(slot, SlotState.READY, draining=slot.draining)
        slot.idle_since = now
        self._idle.setdefault(slot.shape, {})[name] = slot

    def lose(self, names: Iterable[str]) -> list[Slot[Shape]]:
        """These slots are gone; returns the ones to start in their place."""
        lost = self._removed([self.slots[name] for name in names if name in self.slots])
        return [new for shape in dict.fromkeys(slot.shape for slot in lost) for new in self._missing(shape)]

    def drain(self, nodes: Iterable[str]) -> list[Slot[Shape]]:
        """These nodes announced their end; returns the slots to start elsewhere meanwhile."""
        noticed = [slot for node in nodes for slot in self.on_node(node) if not slot.draining]
        for slot in noticed:
            self._change(slot, slot.state, draining=True)
        shapes = dict.fromkeys(slot.shape for slot in noticed)
        return [new for shape in shapes for new in self._missing(shape)]

    def expire(self, now: float) -> list[Slot[Shape]]:
        """Idle slots to stop: of shapes that no job wants, if a job lacks slots that need their room; and, where no
        job wants any, those that nobody has wanted for a while."""
        wanted = {demand.shape for demand in self.demands.values()}
        idle = [slot for shape, slots in self._idle.items() if shape not in wanted for slot in slots.values()]
        if not idle:
            return []
        lacks = any(
            slot.state is SlotState.REQUESTED and slot.shape in wanted for slot in self.slots.values()
        )
        return self._removed(
            [slot for slot in idle if lacks or (not wanted and now - slot.idle_since > IDLE_S)]
        )

    def drop_idle(self) -> list[Slot[Shape]]:
        """Slots to stop so that what they hold is free for something else."""
        return self._removed([slot for slots in self._idle.values() for slot in slots.values()])

    def on_node(self, node: str) -> list[Slot[Shape]]:
        """The slots on this machine."""
        return list(self._on_node.get(node, {}).values())

    # --- within -----------------------------------------------------------------------------------------------

    def _demanded(self, shape: Shape) -> int:
        return sum(demand.max_workers for demand in self.demands.values() if demand.shape == shape)

    def _missing(self, shape: Shape) -> list[Slot[Shape]]:
        """As many slots as the jobs want in all; one on a node that is about to go needs a replacement."""
        return [self._new(shape) for _ in range(self._demanded(shape) - self._count(shape).staying)]

    def _new(self, shape: Shape) -> Slot[Shape]:
        self._made += 1
        slot = self.slots[f"slot-{self._made}"] = Slot(f"slot-{self._made}", shape, self._made)
        self._tally(slot, 1)
        return slot

    def _change(self, slot: Slot[Shape], state: SlotState, *, draining: bool) -> None:
        self._tally(slot, -1)
        slot.state = state
        slot.mark(draining=draining)
        self._tally(slot, 1)

    def _tally(self, slot: Slot[Shape], by: int) -> None:
        if slot.draining or slot.state is SlotState.LOST:
            return
        count = self._count(slot.shape)
        count.staying += by
        if slot.state is SlotState.STARTING:
            count.starting += by

    def _removed(self, slots: list[Slot[Shape]]) -> list[Slot[Shape]]:
        for slot in slots:
            self._change(slot, SlotState.LOST, draining=slot.draining)
            del self.slots[slot.name]
            held = self._of_job.get(slot.job, {}) if slot.job is not None else self._idle.get(slot.shape, {})
            held.pop(slot.name, None)
            on_node = self._on_node.get(slot.node, {})
            on_node.pop(slot.name, None)
            if not on_node:
                self._on_node.pop(slot.node, None)
        return slots

    def _count(self, shape: Shape) -> _Counts:
        return self._counts.setdefault(shape, _Counts())

    def _staying(self, job: str) -> list[Slot[Shape]]:
        return [slot for slot in self._of_job.get(job, {}).values() if not slot.leaving]

    def _num_reclaimed(self, jobs: Iterable[str]) -> int:
        """How many slots these jobs are about to release to another one."""
        held = (slot for job in jobs for slot in self._of_job.get(job, {}).values())
        return sum(slot.reclaimed and not slot.draining for slot in held)

    def _reclaim(self, missing: int, spare: list[Slot[Shape]]) -> None:
        """Mark `missing` of the slots that others have above their minimum.

        If there are not as many, the job could not start with them either, and none is taken from anybody.
        """
        if 0 < missing <= len(spare):
            for slot in spare[-missing:]:
                slot.mark(reclaimed=True)
            self.num_reclaimed += missing
