"""What the simulator reads: numbered machines, what they cost, and when they came, announced their end and went."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.errors import UserError

Kind = Literal["up", "notice", "down"]
# Far above any record: what is beyond would cost memory, or make infinities of sums.
MAX_MACHINES = 20_000
MAX_EVENTS = 1_000_000
MAX_SECONDS = 1e10
# What happens first of what happens at the same time.
_ORDER: dict[str, int] = {"down": 0, "up": 1, "notice": 2}


@dataclass(frozen=True)
class Machine:
    """A machine; `prices` are (from second, price an hour), ascending, the first from 0."""

    name: str
    type: str
    slots: int
    prices: tuple[tuple[float, float], ...]

    def cost(self, begin: float, end: float) -> float:
        """What it costs from second `begin` to second `end`."""
        if end <= begin:
            return 0.0
        total, index = 0.0, bisect.bisect_right(self.prices, (begin, math.inf)) - 1
        while begin < end:
            until = self.prices[index + 1][0] if index + 1 < len(self.prices) else math.inf
            total += (min(until, end) - begin) / 3600 * self.prices[index][1]
            begin, index = until, index + 1
        return total


@dataclass(frozen=True)
class TraceEvent:
    """What happens to machine number `machine` at second `at`; a notice says when it will be gone."""

    at: float
    kind: Kind
    machine: int
    deadline_at: float = math.inf


@dataclass(frozen=True)
class Trace:
    """Machines and what happened to them, in order; in seconds. The record ends at `duration_s` (maybe inf)."""

    name: str
    zone: str
    machines: tuple[Machine, ...]
    events: tuple[TraceEvent, ...]
    duration_s: float = math.inf

    def starting_at(self, seconds: float) -> Trace:
        """The same trace seen by who comes `seconds` later.

        Raises:
            UserError: there is no trace left.
        """
        if seconds <= 0:
            return self
        if seconds >= self.duration_s:
            raise UserError(
                f"the trace {self.name!r} is {self.duration_s:.0f} s long, so nothing can start at {seconds:.0f} s",
                hint="start earlier",
            )
        state: dict[int, TraceEvent | None] = {}
        for event in self.events:
            if event.at > seconds:
                break
            if event.kind == "down":
                state.pop(event.machine, None)
            else:
                state[event.machine] = event if event.kind == "notice" else None
        begin = [TraceEvent(0.0, "up", machine) for machine in sorted(state)]
        for machine, notice in sorted(state.items()):
            if notice is not None:
                begin.append(TraceEvent(0.0, "notice", machine, notice.deadline_at - seconds))
        later = [
            replace(event, at=event.at - seconds, deadline_at=event.deadline_at - seconds)
            for event in self.events
            if event.at > seconds
        ]
        machines = tuple(
            replace(machine, prices=_shifted(machine.prices, seconds)) for machine in self.machines
        )
        return replace(
            self, machines=machines, events=tuple(begin + later), duration_s=self.duration_s - seconds
        )

    def with_notice(self, seconds: float) -> Trace:
        """The same trace with every unannounced end announced `seconds` before, or when the machine came."""
        events, up_at, noticed = list(self.events), {}, set()
        for event in self.events:
            if event.kind == "up":
                up_at[event.machine] = event.at
            elif event.kind == "notice":
                noticed.add(event.machine)
            else:
                if event.machine not in noticed and seconds > 0:
                    at = max(up_at[event.machine], event.at - seconds)
                    events.append(TraceEvent(at, "notice", event.machine, event.at))
                noticed.discard(event.machine)
        return replace(self, events=in_order(events))

    def priced(self, price: float) -> Trace:
        """The same trace with every machine at `price` an hour."""
        machines = tuple(replace(machine, prices=((0.0, price),)) for machine in self.machines)
        return replace(self, machines=machines)


def always(count: int, slots: int, price: float) -> Trace:
    """`count` machines that are there from the start and never go: what on-demand machines are."""
    machines = tuple(Machine(f"on-demand-{i}", "on-demand", slots, ((0.0, price),)) for i in range(count))
    events = tuple(TraceEvent(0.0, "up", i) for i in range(count))
    return Trace("on demand", "", machines, events)


def in_order(events: Iterable[TraceEvent]) -> tuple[TraceEvent, ...]:
    """Sorted by time; at the same time machines go before others come."""
    return tuple(sorted(events, key=lambda event: (event.at, _ORDER[event.kind], event.machine)))


def _shifted(prices: tuple[tuple[float, float], ...], by: float) -> tuple[tuple[float, float], ...]:
    now = [price for since, price in prices if since <= by][-1]
    return ((0.0, now), *((since - by, price) for since, price in prices if since > by))
