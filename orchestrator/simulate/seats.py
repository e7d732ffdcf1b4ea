"""The machines at a time, and the seats on them: the fleet (`elastic/fleet.py`) without Ray.

The same rules: as many seats as the jobs want in all, made where there is room, warm after a while, lent to jobs,
kept from stage to stage, given back when idle. A machine is paid for from its first seat until it goes or all ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.elastic.policy import SeatView
from orchestrator.simulate.trace import Trace

# Idle seats are given back after this long, as the fleet does.
IDLE_S = 30.0


class Seat:
    """A place for one worker.

    Attributes:
        view: what the policy sees of it; leaving if its machine announced its end, or another job needs it more.
        warm: it can take a worker.
        draining: its machine announced its end.
        recalled: another job needs it more.
        job: who has it.
    """

    def __init__(self, name: str, machine: int) -> None:
        self.view = SeatView(name, str(machine))
        self.name, self.machine = name, machine
        self.warm = self.draining = self.recalled = False
        self.job: str | None = None

    def mark(self, *, draining: bool | None = None, recalled: bool | None = None) -> None:
        """Set why it is leaving."""
        self.draining = self.draining if draining is None else draining
        self.recalled = self.recalled if recalled is None else recalled
        leaving = self.draining or self.recalled
        # Views are kept, not made for every decision: a thousand seats are looked at thousands of times.
        if leaving != self.view.leaving:
            self.view = SeatView(self.name, str(self.machine), leaving)


@dataclass
class Demand:
    """How many workers a job wants, and how long a new seat takes to be warm."""

    fewest: int
    most: int
    warm_s: float


@dataclass
class Fleet:
    """All seats on the machines of a trace; time goes on with `advance`.

    `warm` says that the first seats to be made are warm at once; `has_recalled`, that a job has to give up seats
    that another one asked for.
    """

    trace: Trace
    warm: bool = False
    seats: dict[str, Seat] = field(default_factory=dict)
    demands: dict[str, Demand] = field(default_factory=dict)
    now: float = 0.0
    has_recalled: bool = False
    _next: int = 0
    _made: int = 0
    _room: dict[int, int] = field(default_factory=dict)  # free slots of machines that are there and stay
    _on: dict[int, list[Seat]] = field(default_factory=dict)
    _warming: list[tuple[float, int, Seat]] = field(default_factory=list)
    _rented: dict[int, float] = field(default_factory=dict)
    _cost: float = 0.0
    _machine_s: float = 0.0
    _idle_since: float = 0.0

    # --- time -------------------------------------------------------------------------------------------------

    def next_time(self) -> float:
        """When something happens next; inf if nothing does."""
        pending = self.trace.events[self._next].at if self._next < len(self.trace.events) else math.inf
        return min(pending, self._warming[0][0] if self._warming else math.inf)

    def advance(self, now: float) -> list[Seat]:
        """Let happen what happens until `now`, included; returns the seats that are gone."""
        lost: list[Seat] = []
        self.now = now
        events = self.trace.events
        while self._next < len(events) and events[self._next].at <= now:
            event = events[self._next]
            self._next += 1
            if event.kind == "up":
                self._room[event.machine] = self.trace.machines[event.machine].slots
            elif event.kind == "notice":
                self._room.pop(event.machine, None)
                for seat in self._on.get(event.machine, ()):
                    seat.mark(draining=True)
            else:
                lost += self._lose(event.machine, event.at)
        while self._warming and self._warming[0][0] <= now:
            seat = heapq.heappop(self._warming)[2]
            seat.warm = seat.name in self.seats
        self._ask()
        return lost

    # --- what jobs do -----------------------------------------------------------------------------------------

    def want(self, job: str, demand: Demand) -> None:
        """`job` would use up to `demand.most` seats."""
        if not self.demands and self.now - self._idle_since > IDLE_S:
            self._drop_all()
        self.demands[job] = demand
        self._ask()
        self.warm = False

    def leave(self, job: str, now: float) -> None:
        """`job` needs none any more from `now` on; its seats stay warm for the next one."""
        self.demands.pop(job)
        self.give_back(job)
        if not self.demands:
            self._idle_since = now

    def on_offer(self, job: str) -> list[Seat]:
        """Warm seats that `job` has or may take, its own first; enough for others' fewest is left."""
        demand = self.demands[job]
        seats = self.seats.values()
        mine = [seat for seat in seats if seat.job == job]
        idle = [seat for seat in seats if seat.job is None and seat.warm]
        if len(self.demands) == 1:
            return mine + idle
        others = [name for name in self.demands if name != job]
        owed = sum(max(0, self.demands[name].fewest - self._held(name)) for name in others)
        free = min(len(idle), max(0, demand.fewest - len(mine), len(idle) - owed))
        self._recall(job, demand, len(mine) + free)
        return mine + idle[:free]

    def take(self, job: str, names: Sequence[str]) -> None:
        """Take these seats and give back all others."""
        self.give_back(job)
        for name in names:
            self.seats[name].job = job

    def give_back(self, job: str) -> None:
        """Nobody works on the seats of `job` any more."""
        for seat in self.seats.values():
            if seat.job == job:
                seat.job = None
                seat.mark(recalled=False)

    def coming(self) -> int:
        """Seats that are made and will be warm."""
        return sum(not seat.draining and seat.name in self.seats for _, _, seat in self._warming)

    # --- money ------------------------------------------------------------------------------------------------

    def bill(self, end: float) -> tuple[float, float]:
        """What the machines cost until `end`, and their hours."""
        cost, seconds = self._cost, self._machine_s
        for machine, since in self._rented.items():
            cost += self.trace.machines[machine].cost(since, end)
            seconds += end - since
        return cost, seconds / 3600

    # --- within -----------------------------------------------------------------------------------------------

    def _lose(self, machine: int, at: float) -> list[Seat]:
        self._room.pop(machine, None)
        since = self._rented.pop(machine, None)
        if since is not None:
            self._cost += self.trace.machines[machine].cost(since, at)
            self._machine_s += at - since
        lost = self._on.pop(machine, [])
        for seat in lost:
            del self.seats[seat.name]
        return lost

    def _ask(self) -> None:
        """Make as many seats as the jobs want in all, where there is room; those that leave count until they go."""
        missing = sum(demand.most for demand in self.demands.values()) - len(self.seats)
        if missing <= 0 or not self._room:
            return
        warm_s = 0.0 if self.warm else max(demand.warm_s for demand in self.demands.values())
        for machine in list(self._room):
            while missing > 0 and machine in self._room:
                self._make(machine, warm_s)
                missing -= 1

    def _make(self, machine: int, warm_s: float) -> None:
        self._made += 1
        seat = Seat(f"seat-{self._made}", machine)
        self.seats[seat.name] = seat
        self._on.setdefault(machine, []).append(seat)
        heapq.heappush(self._warming, (self.now + warm_s, self._made, seat))
        self._rented.setdefault(machine, self.now)
        self._room[machine] -= 1
        if not self._room[machine]:
            del self._room[machine]

    def _drop_all(self) -> None:
        for machine, seats in self._on.items():
            if any(not seat.draining for seat in seats):
                self._room[machine] = self._room.get(machine, 0) + len(seats)
        self._on.clear()
        self.seats.clear()
        self._warming.clear()

    def _recall(self, job: str, demand: Demand, has: int) -> None:
        """A job below its fewest gets back what others have beyond theirs."""
        missing = demand.fewest - has
        for seat in self.seats.values():
            if missing <= 0:
                return
            if not seat.warm or seat.job in (None, job):
                continue
            if seat.recalled:
                missing -= 1
                continue
            staying = sum(other.job == seat.job and not other.view.leaving for other in self.seats.values())
            if staying > self.demands[seat.job or ""].fewest:
                seat.mark(recalled=True)
                self.has_recalled = True
                missing -= 1

    def _held(self, job: str) -> int:
        return sum(seat.job == job for seat in self.seats.values())
