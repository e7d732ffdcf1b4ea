"""Replays: the player on a market that only writes down what it is told, and (slow) the real thing."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench._replay import Replayed, replay

from .conftest import machines

ROOT = Path(__file__).parents[2]
DRIVER = (
    "import time\n"
    "print('  starting Ray …', flush=True)\n"
    "time.sleep(0.3)\n"
    "print('▶ train  started  never ran', flush=True)\n"
    "time.sleep({seconds})\n"
    "print('said at the end')\n"
    "raise SystemExit({code})\n"
)


class Book:
    """A market whose machines take time to come, as raylets do."""

    def __init__(self, *names: str) -> None:
        self.machines: dict[str, Any] = dict.fromkeys(names)
        self.leaving: set[str] = set()
        self.told: list[tuple[str, str]] = []

    def add(self, name: str) -> str:
        time.sleep(0.5)
        self.told.append(("add", name))
        self.machines[name] = None
        return name

    def kill(self, name: str) -> float:
        self.told.append(("kill", name))
        del self.machines[name]
        return time.time()

    def drain(self, name: str, notice_s: float) -> None:
        assert name in self.machines
        self.told.append((f"drain {notice_s:g}", name))


def play(market: Book, trace: Any, *, seconds: float, code: int = 0, timeout_s: float = 60) -> Replayed:
    program = DRIVER.format(seconds=seconds, code=code)
    return replay(
        market,  # type: ignore[arg-type]
        trace,
        [sys.executable, "-c", program],
        stage="train",
        folder=Path.cwd(),
        environment={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout_s=timeout_s,
    )


def test_events_happen_in_time_and_machines_are_kept() -> None:
    events = [
        (0, "up", 0),
        (0, "up", 1),
        (4, "down", 0),
        (4.5, "notice", 1, 5.5),
        (5, "up", 2),
        (5.5, "down", 1),
    ]
    market = Book("m1", "left over")
    before = time.time()
    done = play(market, machines(events, 3), seconds=7)
    assert market.told[:2] == [("kill", "left over"), ("add", "m0")]
    assert sorted(market.told[2:]) == [("add", "m2"), ("drain 1", "m1"), ("kill", "m0"), ("kill", "m1")]
    assert done.code == 0
    assert "said at the end" in done.output
    assert before < done.began < time.time()
    assert {(event.kind, event.machine) for event in done.played} == {
        ("down", "m0"),
        ("notice", "m1"),
        ("up", "m2"),
        ("down", "m1"),
    }
    for event in done.played:
        # What a start takes is not known at first; what goes must not go early.
        assert event.done_s > event.planned_s - (3.0 if event.kind != "down" else 0.0)
        assert event.at == pytest.approx(done.began + event.done_s, abs=0.5)


def test_a_machine_whose_end_was_announced_before_is_replaced() -> None:
    market = Book("m0", "m1")
    market.leaving.add("m1")
    play(market, machines([(0, "up", 0), (0, "up", 1)], 2), seconds=0.5)
    assert market.told == [("kill", "m1"), ("add", "m1")]


def test_what_is_left_of_a_trace_is_not_played() -> None:
    done = play(Book(), machines([(0, "up", 0), (500, "down", 0)], 1), seconds=0.5, code=3)
    assert done.code == 3
    assert done.played == ()


def test_a_run_that_never_ends_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)did not end within 2 s.*train  started"):
        play(Book("m0"), machines([(0, "up", 0)], 1), seconds=600, timeout_s=2)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_real_replay_goes_as_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four raylets, two hours of a market in minutes: finish time and goodput within 15% of the prediction."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import harness
    from bench import replay as bench_replay

    claim = bench_replay.run(quick=True)
    told = harness.as_json(claim)
    assert claim.figure <= bench_replay.GOAL, told
