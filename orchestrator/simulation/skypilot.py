"""SkyPilot's public spot traces as traces of ours.

Their form (README of github.com/skypilot-org/spot-traces; Wu et al., NSDI 2024): an object with
`metadata.gap_seconds` and `data`, the number of machines that could be had at each tick.
"""

from __future__ import annotations

import re
from typing import Any

from orchestrator.errors import UserError
from orchestrator.simulation.json_file import JsonFile
from orchestrator.simulation.trace import (
    MAX_EVENTS,
    MAX_MACHINES,
    MAX_SECONDS,
    Machine,
    Trace,
    TraceEvent,
    in_order,
)

# us-west-2a_v100_1.json: zone, accelerator, how many a machine has
_NAME = re.compile(r"(?P<zone>[^_]+)_(?P<type>[^_]+)_(?P<slots>\d+)")
_CPU_TYPES = ("intel", "amd")


def is_skypilot(data: Any) -> bool:
    """Whether a JSON value has the form of SkyPilot's traces."""
    return isinstance(data, dict) and "data" in data and "metadata" in data and "format" not in data


def convert(file: JsonFile) -> Trace:
    """A pool of as many machines as there ever were, the first to come the last to go; no notices, no prices.

    Raises:
        UserError: the file breaks the form.
    """
    gap, counts = _checked(file)
    match = _NAME.fullmatch(file.path.stem)
    zone, type_ = (match["zone"], match["type"]) if match else ("", "machine")
    # A worker takes a GPU; the CPU traces count cores, and there a machine is a worker.
    slots = max(1, int(match["slots"])) if match and type_ not in _CPU_TYPES else 1
    machines = tuple(Machine(f"{type_}-{i}", type_, slots, ((0.0, 0.0),)) for i in range(max(counts)))
    events: list[TraceEvent] = []
    before = 0
    for tick, count in enumerate(counts):
        events += [TraceEvent(tick * gap, "up", machine) for machine in range(before, count)]
        events += [TraceEvent(tick * gap, "down", machine) for machine in range(count, before)]
        before = count
    return Trace(file.path.stem, zone, machines, in_order(events), len(counts) * gap)


def _checked(file: JsonFile) -> tuple[float, list[int]]:
    metadata, counts = file.data["metadata"], file.data["data"]
    gap = metadata.get("gap_seconds") if isinstance(metadata, dict) else None
    if isinstance(gap, bool) or not isinstance(gap, (int, float)) or not (0 < gap <= MAX_SECONDS):
        raise UserError(
            f"metadata.gap_seconds must be a number of seconds, not {gap!r:.60}",
            where=file.where(("metadata",)),
        )
    if not isinstance(counts, list) or not counts:
        raise UserError("data must be a list of how many machines there were", where=file.where(("data",)))
    changes = before = 0
    for tick, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_MACHINES:
            raise UserError(
                f"data[{tick}] must be a number of machines, up to {MAX_MACHINES:,}, not {count!r:.60}",
                where=file.where(("data", tick)),
            )
        changes, before = changes + abs(count - before), count
        if changes > MAX_EVENTS:
            raise UserError(
                f"more than {MAX_EVENTS:,} machines come and go", where=file.where(("data", tick))
            )
    return float(gap), counts
