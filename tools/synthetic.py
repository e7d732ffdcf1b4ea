"""Made-up traces for examples, tests and benchmarks: machines that fail at random, drawn from a seed.

`python -m tools.synthetic FOLDER` writes the examples of `conf/traces`.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from orchestrator.simulation.trace import Machine, Trace, TraceEvent, in_order
from orchestrator.simulation.trace_file import FORMAT


def synthetic(
    name: str,
    *,
    count: int,
    duration_s: float,
    mean_up_s: float,
    mean_down_s: float,
    notice_s: float = 120.0,
    notice_share: float = 1.0,
    slots: int = 1,
    price: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Machines that are there from the start, go and come back after exponentially distributed times.

    Args:
        count: of machines.
        mean_up_s, mean_down_s: mean time until a machine goes, and until it is back.
        notice_s: how long before its end a machine says so, if it does.
        notice_share: of the ends that are announced.
        price: of a machine, an hour.
        seed: of everything drawn.
    """
    draw = random.Random(f"{name}/{seed}")
    events: list[TraceEvent] = []
    for machine in range(count):
        now = 0.0
        while now < duration_s:
            events.append(TraceEvent(round(now, 3), "up", machine))
            gone = round(now + draw.expovariate(1 / mean_up_s), 3)
            if draw.random() < notice_share and gone <= duration_s:
                at = round(max(now, gone - notice_s), 3)
                events.append(TraceEvent(at, "notice", machine, gone))
            if gone <= duration_s:
                events.append(TraceEvent(gone, "down", machine))
            now = round(gone + draw.expovariate(1 / mean_down_s), 3)
    machines = tuple(Machine(f"{name}-{i}", "synthetic", slots, ((0.0, price),)) for i in range(count))
    return Trace(name, "made up", machines, in_order(events), duration_s)


def examples() -> dict[str, tuple[Trace, str]]:
    """The examples by file name, each with how it was made."""
    hour, day = 3600.0, 86400.0
    calm = synthetic(
        "calm", count=4, duration_s=2 * day, mean_up_s=12 * hour, mean_down_s=hour, price=0.9, slots=2, seed=1
    )
    stormy = synthetic(
        "stormy",
        count=8,
        duration_s=6 * hour,
        mean_up_s=hour,
        mean_down_s=0.25 * hour,
        notice_s=30,
        notice_share=0.5,
        price=0.9,
        seed=2,
    )
    return {
        "calm.json": (calm, "mean 12 h up, 1 h down; all ends announced 120 s before"),
        "stormy.json": (stormy, "mean 1 h up, 15 min down; half of the ends announced 30 s before"),
    }


def write_examples(folder: Path) -> None:
    """Write the examples, and one of them in SkyPilot's form, sampled every five minutes."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, (trace, how) in examples().items():
        notes = f"synthetic, no record of any cloud: {how}; written by python -m tools.synthetic"
        (folder / file).write_text(_one_event_a_line(as_dict(trace, notes)))
    stormy = examples()["stormy.json"][0]
    counts, there, gap, pending = [], set[int](), 300.0, list(stormy.events)
    for tick in range(int(stormy.duration_s // gap)):
        while pending and pending[0].at <= tick * gap:
            event = pending.pop(0)
            (there.discard if event.kind == "down" else there.add)(event.machine)
        counts.append(len(there))
    sampled = {"metadata": {"gap_seconds": gap, "notes": "synthetic: stormy.json, sampled"}, "data": counts}
    (folder / "madeup-1a_v100_1.json").write_text(json.dumps(sampled) + "\n")


def as_dict(trace: Trace, notes: str = "") -> dict[str, Any]:
    """The trace in the form of a file, machine by machine; needs one price a machine."""
    nodes = {m.name: {"type": m.type, "slots": m.slots, "price": m.prices[0][1]} for m in trace.machines}
    events = []
    announced: dict[int, float] = {}
    for event in trace.events:
        if event.kind == "down" and announced.pop(event.machine, None) == event.at:
            continue  # it goes without saying
        entry: dict[str, Any] = {"at": round(event.at, 3), "node": trace.machines[event.machine].name}
        entry["event"] = event.kind
        if event.kind == "notice":
            announced[event.machine] = event.deadline_at
            entry["deadline"] = round(event.deadline_at - event.at, 3)
        events.append(entry)
    head: dict[str, Any] = {"format": FORMAT, "version": 1, "name": trace.name, "zone": trace.zone}
    if notes:
        head["notes"] = notes
    if math.isfinite(trace.duration_s):
        head["duration"] = trace.duration_s
    return head | {"nodes": nodes, "events": events}


def _one_event_a_line(data: dict[str, object]) -> str:
    events = data["events"]
    assert isinstance(events, list)
    head = json.dumps({key: value for key, value in data.items() if key != "events"}, indent=1)
    lines = ",\n  ".join(json.dumps(event) for event in events)
    return f'{head[:-2]},\n "events": [\n  {lines}\n ]\n}}\n'


if __name__ == "__main__":
    write_examples(Path(sys.argv[1]))
