"""The machines of a trace as time goes on: what has room, which slots are on it, and what it costs.

The worker pool's rules say how many slots there should be and who has them; here is where slots find a machine. A
slot that was requested waits until a machine has room for it, and is ready some seconds after that. A machine is paid
for from its first slot until it goes or all ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestrator.elastic.worker_pool import Demand, Slot, SlotState, WorkerPool
from orchestrator.simulation.trace import Trace

# A trace says for how many workers a machine has room, so all slots are alike.
_SHAPE = "worker"


@dataclass
class Machines:
    """All machines of a trace and the pool of slots on them; time goes on with `advance`.

    Args:
        trace: what happens to the machines.
        warm: slots that are placed as soon as the first job asks are ready at once.

    Attributes:
        pool: the slots, and which job has them.
        now: the second of the trace up to which everything has happened.
    """

    trace: Trace
    warm: bool = False
    pool: WorkerPool[str] = field(default_factory=WorkerPool)
    now: float = 0.0
    _next: int = 0  # event
    _room: dict[int, int] = field(default_factory=dict)  # for slots, on machines that are there and stay
    _requested: dict[str, Slot[str]] = field(default_factory=dict)  # wait for room
    _starting: list[tuple[float, int, Slot[str]]] = field(default_factory=list)  # by the time they are ready
    _warm_s: dict[str, float] = field(default_factory=dict)  # by job
    _first_request: float = math.nan
    _rented: dict[int, float] = field(default_factory=dict)
    _cost: float = 0.0
    _machine_s: float = 0.0

    # --- time -------------------------------------------------------------------------------------------------

    def next_time(self) -> float:
        """When something happens next; inf if nothing does."""
        event = self.trace.events[self._next].at if self._next < len(self.trace.events) else math.inf
        return min(event, self._starting[0][0] if self._starting else math.inf)

    def advance(self, now: float) -> list[Slot[str]]:
        """Let happen what happens until `now`, included; returns the slots that are gone."""
        lost: list[Slot[str]] = []
        self.now = now
        events = self.trace.events
        while self._next < len(events) and events[self._next].at <= now:
            event = events[self._next]
            self._next += 1
            if event.kind == "up":
                self._room[event.machine] = self.trace.machines[event.machine].slots
            elif event.kind == "notice":
                self._room.pop(event.machine, None)
                self._request(self.pool.drain([str(event.machine)]))
            else:
                lost += self._lose(event.machine, event.at)
        while self._starting and self._starting[0][0] <= now:
            at, _, slot = heapq.heappop(self._starting)
            if slot.state is SlotState.STARTING:
                self.pool.ready(slot.name, at)
        for slot in self.pool.expire(now):
            if not slot.draining:
                self._room[int(slot.node)] = self._room.get(int(slot.node), 0) + 1
        self._place()
        return lost

    # --- what jobs do -----------------------------------------------------------------------------------------

    def request(self, job: str, workers: tuple[int, int], warm_s: float) -> None:
        """`job` would use so many workers, whose slots are ready `warm_s` after they found a machine."""
        if math.isnan(self._first_request):
            self._first_request = self.now
        self._warm_s[job] = warm_s
        self._request(self.pool.request(job, Demand(*workers, _SHAPE)))
        self._place()

    def withdraw(self, job: str, now: float) -> None:
        """`job` needs no workers from `now` on; slots that are ready stay for the next one."""
        del self._warm_s[job]
        for slot in self.pool.withdraw(job, now):
            del self._requested[slot.name]

    # --- money ------------------------------------------------------------------------------------------------

    def bill(self, end: float) -> tuple[float, float]:
        """What the machines cost until `end`, and their hours."""
        cost, seconds = self._cost, self._machine_s
        for machine, since in self._rented.items():
            cost += self.trace.machines[machine].cost(since, end)
            seconds += end - since
        return cost, seconds / 3600

    # --- within -----------------------------------------------------------------------------------------------

    def _request(self, slots: Iterable[Slot[str]]) -> None:
        self._requested.update((slot.name, slot) for slot in slots)

    def _place(self) -> None:
        """Put slots on machines, those that were requested first on the machine that came first."""
        while self._requested and self._room:
            machine = next(iter(self._room))
            name = next(iter(self._requested))
            slot = self._requested.pop(name)
            self.pool.placed(name, str(machine))
            warm = self.warm and self.now == self._first_request
            ready_at = self.now + (0.0 if warm else max(self._warm_s.values()))
            heapq.heappush(self._starting, (ready_at, slot.number, slot))
            self._rented.setdefault(machine, self.now)
            self._room[machine] -= 1
            if not self._room[machine]:
                del self._room[machine]

    def _lose(self, machine: int, at: float) -> list[Slot[str]]:
        self._room.pop(machine, None)
        since = self._rented.pop(machine, None)
        if since is not None:
            self._cost += self.trace.machines[machine].cost(since, at)
            self._machine_s += at - since
        lost = self.pool.on_node(str(machine))
        self._request(self.pool.lose(slot.name for slot in lost))
        return lost
