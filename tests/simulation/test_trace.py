"""Trace files: both forms, what pools and notices mean, and every mistake with its line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UserError
from orchestrator.simulation.trace import Machine
from orchestrator.simulation.trace_file import read_trace
from tools import synthetic

from .conftest import machines

ROOT = Path(__file__).parents[2]


def written(folder: Path, name: str = "trace.json", **parts: Any) -> Path:
    head: dict[str, Any] = {
        "format": "orchestrator-trace",
        "version": 1,
        "name": "t",
        "nodes": {},
        "events": [],
    }
    path = folder / name
    path.write_text(json.dumps(head | parts, indent=1))
    return path


def seen(path: Path) -> list[tuple[float, str, str]]:
    trace = read_trace(path)
    return [(event.at, event.kind, trace.machines[event.machine].name) for event in trace.events]


def test_nodes_pools_units_and_prices(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        unit_s=60,
        duration=100,
        nodes={"a": {"type": "gpu", "slots": 8, "price": [[0, 2.0], [30, 4.0]]}},
        pools={"p": {"count": 3, "price": 0.5}},
        events=[
            {"at": 0, "node": "a", "event": "up"},
            {"at": 0, "pool": "p", "event": "up", "count": 2},
            {"at": 1, "pool": "p", "event": "notice", "deadline": 2},
            {"at": 2, "pool": "p", "event": "up"},
            {"at": 5, "pool": "p", "event": "down", "count": 2},
        ],
    )
    trace = read_trace(path)
    assert trace.duration_s == 6000
    # The first to come are the last to go, and an announced machine goes at its deadline without a `down`.
    assert seen(path) == [
        (0, "up", "a"),
        (0, "up", "p-0"),
        (0, "up", "p-1"),
        (60, "notice", "p-1"),
        (120, "up", "p-2"),
        (180, "down", "p-1"),
        (300, "down", "p-0"),
        (300, "down", "p-2"),
    ]
    a = trace.machines[0]
    assert (a.type, a.slots) == ("gpu", 8)
    # half an hour at 2 an hour, then one at 4
    assert a.cost(0, 5400) == pytest.approx(0.5 * 2 + 1 * 4)


def test_an_announced_machine_may_go_early(tmp_path: Path) -> None:
    events = [
        {"at": 0, "node": "a", "event": "up"},
        {"at": 10, "node": "a", "event": "notice", "deadline": 100},
        {"at": 20, "node": "a", "event": "down"},
        {"at": 30, "node": "a", "event": "up"},
        {"at": 500, "node": "a", "event": "notice", "deadline": 7},
    ]
    path = written(tmp_path, nodes={"a": {}}, events=events)
    assert [(at, kind) for at, kind, _ in seen(path)] == [
        (0, "up"),
        (10, "notice"),
        (20, "down"),
        (30, "up"),
        (500, "notice"),
        (507, "down"),
    ]


@pytest.mark.parametrize(
    ("parts", "message", "line"),
    [
        ({"events": [{"at": 0, "node": "nood", "event": "up"}]}, "unknown node 'nood'.*mean 'node'", "node"),
        ({"events": [{"at": 0, "pool": "x", "event": "up"}]}, "unknown pool 'x'.*there are: none", "pool"),
        (
            {
                "events": [
                    {"at": 5, "node": "node", "event": "up"},
                    {"at": 4, "node": "node", "event": "down"},
                ]
            },
            "at 4 comes after 5.*sort the events",
            "at",
        ),
        ({"nodes": {"node": {"price": -1}}}, "nodes.node.price: must be greater than or equal to 0", "price"),
        ({"nodes": {"node": {"slots": True}}}, "nodes.node.slots: must be an integer, not true", "slots"),
        ({"nodes": {"node": {"price": [[5, 1.0]]}}}, "must start at 0 and increase", "node"),
        ({"nodes": {"node": {"slot": 1}}}, "unknown key 'slot'.*mean 'slots'", "slot"),
        (
            {"events": [{"at": 0, "node": "node", "event": "down"}]},
            "'node' cannot get.*'down'.*not up",
            "event",
        ),
        ({"events": [{"at": 0, "node": "node", "event": "uup"}]}, "event: must be 'up', 'notice'", "event"),
        ({"events": [{"at": 0, "event": "up"}]}, "either `node` or `pool`", "at"),
        ({"events": [{"at": 0, "node": "node", "event": "notice"}]}, "every notice has one", "at"),
        ({"events": [{"node": "node", "event": "up"}]}, "'events.0' is missing the key 'at'", "node"),
        (
            {"duration": 5, "events": [{"at": 6, "node": "node", "event": "up"}]},
            "at 6, comes after the duration 5",
            "duration",
        ),
        (
            {"pools": {"p": {"count": 2}}, "events": [{"at": 0, "pool": "p", "event": "up", "count": 3}]},
            "3 machines of 'p' cannot get 'up': 2 are down",
            "event",
        ),
    ],
)
def test_mistakes_say_their_line(tmp_path: Path, parts: dict[str, Any], message: str, line: str) -> None:
    path = written(tmp_path, **{"nodes": {"node": {}}, **parts})
    with pytest.raises(UserError, match=f"(?s){message}") as caught:
        read_trace(path)
    said = caught.value.where
    assert said is not None
    number = int(said.removeprefix(f"{path}:").split()[0])
    # The line is that of the key, or of the object that lacks it.
    text = path.read_text().splitlines()
    assert any(f'"{line}"' in candidate for candidate in text[number - 1 : number + 1]), (
        said,
        text[number - 1],
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "orchestrator-trace",\n "version": 1,,}', "not JSON.*trace.json:2:"),
        ('{"format": "orchestrator-trace", "x": NaN}', "not JSON: NaN is not a number"),
        ("[1, 2]", "not a trace"),
        ('{"format": "other"}', "not a trace.*docs/traces.md"),
    ],
)
def test_what_is_no_trace(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        read_trace(path)


def test_mistakes_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path, events=[{"at": -1, "node": "a", "event": "up"}] * 23)
    with pytest.raises(UserError) as caught:
        read_trace(path)
    said = str(caught.value).splitlines()
    assert sum("must be greater than or equal to 0" in line for line in said) == 20
    assert said[-1] == "and 3 more mistakes"


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path, "calm.json")
    with pytest.raises(UserError, match=r"(?s)no such trace.*did you mean .*calm\.json"):
        read_trace(tmp_path / "clam.json")


def test_skypilot_traces_convert(tmp_path: Path) -> None:
    path = tmp_path / "us-west-2a_v100_8.json"
    path.write_text('{"metadata": {"gap_seconds": 300}, "data": [0, 2, 2, 1, 3, 0]}')
    trace = read_trace(path)
    assert (trace.zone, trace.name, trace.duration_s) == ("us-west-2a", "us-west-2a_v100_8", 1800)
    assert [(machine.type, machine.slots) for machine in trace.machines] == [("v100", 8)] * 3
    events = [(event.at, event.kind, event.machine) for event in trace.events]
    assert events == [
        (300, "up", 0),
        (300, "up", 1),
        (900, "down", 1),
        (1200, "up", 1),
        (1200, "up", 2),
        (1500, "down", 0),
        (1500, "down", 1),
        (1500, "down", 2),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"metadata": {}, "data": [1]}', "gap_seconds must be a number of seconds, not None"),
        ('{"metadata": {"gap_seconds": 0}, "data": [1]}', "gap_seconds must be"),
        ('{"metadata": {"gap_seconds": 5}, "data": []}', "data must be a list"),
        ('{"metadata": {"gap_seconds": 5}, "data": [1,\n-1]}', r"(?s)data\[1\] must be a number.*json:2"),
    ],
)
def test_broken_skypilot_traces(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "zone_v100_1.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_trace(path)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_starting_later_sees_the_same_machines(counts: list[int], data: st.DataObject) -> None:
    events, before = [], 0
    for tick, count in enumerate(counts):
        events += [(float(tick), "up", machine) for machine in range(before, count)]
        events += [(float(tick), "down", machine) for machine in range(count, before)]
        before = count
    trace = machines(events, 5, duration_s=float(len(counts)))
    start = data.draw(st.integers(0, len(counts) - 1))
    later = trace.starting_at(start)
    assert later.duration_s == len(counts) - start
    up: set[int] = set()
    there: dict[float, int] = {}
    for event in later.events:
        (up.add if event.kind == "up" else up.discard)(event.machine)
        there[event.at] = len(up)
    for tick in range(start, len(counts)):
        known = [number for at, number in sorted(there.items()) if at <= tick - start]
        assert (known[-1] if known else 0) == counts[tick]


def test_starting_between_notice_and_end_keeps_the_notice() -> None:
    trace = machines([(0, "up", 0), (10, "notice", 0, 30.0), (30, "down", 0)], 1)
    events = [(event.at, event.kind, event.deadline_at) for event in trace.starting_at(25).events]
    assert events == [(0.0, "up", math.inf), (0.0, "notice", 5.0), (5.0, "down", math.inf)]
    with pytest.raises(UserError, match="nothing can start at 50"):
        machines([], 1, duration_s=40).starting_at(50)


def test_prices_move_with_the_start() -> None:
    machine = Machine("m", "t", 1, ((0.0, 1.0), (100.0, 2.0), (200.0, 3.0)))
    trace = machines([(0, "up", 0)], 1)
    later = type(trace)("t", "", (machine,), trace.events).starting_at(150)
    assert later.machines[0].prices == ((0.0, 2.0), (50.0, 3.0))


def test_with_notice_announces_what_was_not() -> None:
    events = [
        (0, "up", 0),
        (0, "up", 1),
        (10, "notice", 1, 50.0),
        (50, "down", 1),
        (60, "down", 0),
        (70, "up", 0),
    ]
    trace = machines([*events, (75, "down", 0)], 2).with_notice(20)
    notices = [(e.at, e.machine, e.deadline_at) for e in trace.events if e.kind == "notice"]
    # the announced one stays as it is; the last machine was there for five seconds only
    assert notices == [(10, 1, 50.0), (40, 0, 60), (70, 0, 75)]


def test_examples_are_what_the_generator_makes(tmp_path: Path) -> None:
    synthetic.write_examples(tmp_path)
    shipped = ROOT / "conf" / "traces"
    assert sorted(path.name for path in shipped.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        assert path.read_text() == (shipped / path.name).read_text(), f"write {path.name} anew"
        assert "synthetic" in path.read_text()


def test_a_trace_survives_being_written(tmp_path: Path) -> None:
    trace = synthetic.examples()["stormy.json"][0]
    path = tmp_path / "again.json"
    path.write_text(json.dumps(synthetic.as_dict(trace)))
    assert read_trace(path).events == trace.events
    assert read_trace(path).machines == trace.machines
