"""Trace files (docs/traces.md): the form, and from names and pools to the numbered machines of a `Trace`."""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.config.settings import Settings
from orchestrator.errors import UserError, nearest
from orchestrator.simulation import skypilot
from orchestrator.simulation.json_file import JsonFile
from orchestrator.simulation.trace import (
    MAX_EVENTS,
    MAX_MACHINES,
    MAX_SECONDS,
    Kind,
    Machine,
    Trace,
    TraceEvent,
    in_order,
)

FORMAT = "orchestrator-trace"

Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class MachineSpec(Settings):
    """A machine: what it is, workers it has room for, price an hour (or steps of `[time, price]`)."""

    type: str = "machine"
    slots: int = Field(1, ge=1, le=4096)
    price: Price | list[tuple[Seconds, Price]] = 0.0

    @model_validator(mode="after")
    def _ascending(self) -> MachineSpec:
        if isinstance(self.price, list):
            times = [time for time, _ in self.price]
            if not times or times[0] != 0 or times != sorted(set(times)):
                raise ValueError("the times of a price series must start at 0 and increase")
        return self


class PoolSpec(MachineSpec):
    """`count` machines alike; events name the pool and how many."""

    count: int = Field(ge=1, le=MAX_MACHINES)


class EventSpec(Settings):
    """Something that happens to a machine, or to `count` machines of a pool."""

    at: Seconds
    event: Kind
    node: str | None = None
    pool: str | None = None
    count: int = Field(1, ge=1, le=MAX_MACHINES)
    deadline: Seconds | None = None

    @model_validator(mode="after")
    def _fits(self) -> EventSpec:
        if (self.node is None) == (self.pool is None):
            raise ValueError("an event must have either `node` or `pool`")
        if self.node is not None and self.count != 1:
            raise ValueError("count is only for pools")
        if (self.event == "notice") != (self.deadline is not None):
            raise ValueError("a deadline belongs to a notice, and every notice has one")
        return self


class TraceSpec(Settings):
    """A trace file of version 1."""

    format: Literal["orchestrator-trace"]
    version: Literal[1]
    name: str
    zone: str = ""
    notes: str = ""
    unit_s: float = Field(
        1.0, gt=0, le=1e6, allow_inf_nan=False, description="The length of one unit of time, in seconds."
    )
    duration: Seconds | None = Field(
        None, description="The end of the trace. Default: the last state lasts indefinitely."
    )
    nodes: dict[str, MachineSpec] = Field({})
    pools: dict[str, PoolSpec] = Field({})
    events: list[EventSpec]


def read_trace(path: Path) -> Trace:
    """Read a trace file, ours or SkyPilot's.

    Raises:
        UserError: whatever is wrong with it, with its line.
    """
    file = JsonFile(path, "trace")
    if skypilot.is_skypilot(file.data):
        return skypilot.convert(file)
    if not isinstance(file.data, dict) or file.data.get("format") != FORMAT:
        raise UserError(
            f'not a trace: a trace is an object with "format": "{FORMAT}"',
            where=file.where(),
            hint="docs/traces.md describes both forms that are read",
        )
    return _Compiler(file, file.parse(TraceSpec)).trace()


class _Compiler:
    """Turns names and pools into numbered machines, and checks that what happens can happen."""

    def __init__(self, file: JsonFile, spec: TraceSpec) -> None:
        self.file, self.spec = file, spec
        self.machines: list[Machine] = []
        self.members: dict[tuple[str, str], list[int]] = {}
        self.up: set[int] = set()
        self.noticed: dict[int, float] = {}  # in the order of the notices
        self.deadlines: list[tuple[float, int]] = []
        self.events: list[TraceEvent] = []

    def trace(self) -> Trace:
        spec = self.spec
        machines = len(spec.nodes) + sum(pool.count for pool in spec.pools.values())
        if machines > MAX_MACHINES:
            raise UserError(
                f"the trace has {machines:,} machines, and may have {MAX_MACHINES:,}",
                where=self.file.where(("pools",)),
            )
        for name, node in spec.nodes.items():
            self._add(("nodes", name), node, [name])
        for name, pool in spec.pools.items():
            self._add(("pools", name), pool, [f"{name}-{i}" for i in range(pool.count)])
        before = 0.0
        for index, event in enumerate(spec.events):
            if event.at < before:
                self._refuse(
                    index, f"at {event.at:g} comes after {before:g}", "at", hint="sort the events by time"
                )
            before = event.at
            self._expire(event.at * spec.unit_s)
            self._apply(index, event)
            if len(self.events) > MAX_EVENTS:
                self._refuse(index, f"more than {MAX_EVENTS:,} machines come and go", "at")
        if spec.duration is not None and spec.duration < before:
            raise UserError(
                f"the last event, at {before:g}, comes after the duration {spec.duration:g}",
                where=self.file.where(("duration",)),
            )
        self._expire(math.inf)
        duration = math.inf if spec.duration is None else spec.duration * spec.unit_s
        return Trace(spec.name, spec.zone, tuple(self.machines), in_order(self.events), duration)

    def _add(self, key: tuple[str, str], spec: MachineSpec, names: list[str]) -> None:
        series = spec.price if isinstance(spec.price, list) else [(0.0, spec.price)]
        prices = tuple((time * self.spec.unit_s, price) for time, price in series)
        first = len(self.machines)
        self.machines += [Machine(name, spec.type, spec.slots, prices) for name in names]
        self.members[key] = list(range(first, len(self.machines)))

    def _expire(self, now: float) -> None:
        """Announced machines go at their deadline, unless a `down` came first."""
        while self.deadlines and self.deadlines[0][0] < now:
            deadline, machine = heapq.heappop(self.deadlines)
            if self.noticed.get(machine) == deadline:
                self._go(deadline, machine)

    def _go(self, at: float, machine: int) -> None:
        self.up.discard(machine)
        self.noticed.pop(machine, None)
        self.events.append(TraceEvent(at, "down", machine))

    def _apply(self, index: int, event: EventSpec) -> None:
        at = event.at * self.spec.unit_s
        for machine in self._chosen(index, event):
            if event.event == "down":
                self._go(at, machine)
            elif event.event == "up":
                self.up.add(machine)
                self.events.append(TraceEvent(at, "up", machine))
            else:
                assert event.deadline is not None
                gone = at + event.deadline * self.spec.unit_s
                self.noticed[machine] = gone
                heapq.heappush(self.deadlines, (gone, machine))
                self.events.append(TraceEvent(at, "notice", machine, gone))

    def _chosen(self, index: int, event: EventSpec) -> list[int]:
        """The machines an event means: of a pool, the first to come and the last to go; announced ones go first."""
        section, name = ("nodes", event.node) if event.node is not None else ("pools", event.pool)
        assert name is not None
        members = self.members.get((section, name))
        if members is None:
            known = [known for kind, known in self.members if kind == section]
            close = nearest(name, known)
            listed = ", ".join(known[:8]) or "none"
            hint = f"did you mean {close!r}?" if close else f"there are: {listed}"
            self._refuse(index, f"unknown {section[:-1]} {name!r}", section[:-1], hint=hint)
        assert members is not None
        if event.event == "up":
            fitting = [machine for machine in members if machine not in self.up]
        elif event.event == "notice":
            fitting = [m for m in reversed(members) if m in self.up and m not in self.noticed]
        else:
            own = set(members)
            fitting = [machine for machine in self.noticed if machine in own]
            fitting += [m for m in reversed(members) if m in self.up and m not in self.noticed]
        if len(fitting) < event.count:
            self._impossible(index, event, name, len(fitting))
        return fitting[: event.count]

    def _impossible(self, index: int, event: EventSpec, name: str, there: int) -> None:
        state = {"up": "down", "down": "up", "notice": "up and without a notice"}[event.event]
        if event.pool is None:
            what = f"{name!r} cannot get the event {event.event!r}: it is not {state} at {event.at:g}"
        else:
            what = f"{event.count} machines of {name!r} cannot get {event.event!r}: {there} are {state}"
        hint = "an announced machine goes at its deadline" if event.event == "down" else None
        self._refuse(index, what, "event", hint=hint)

    def _refuse(self, index: int, what: str, key: str, *, hint: str | None = None) -> None:
        raise UserError(what, where=self.file.where(("events", index, key)), hint=hint)
