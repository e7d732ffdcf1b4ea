"""Every second has one cause, whatever happens in which order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic import run_monitor
from orchestrator.elastic.run_monitor import RunMonitor
from orchestrator.elastic.time_accounting import Recovery, TimeAccounting
from orchestrator.tracking.spool import Spool


def test_a_story_with_a_loss_and_a_wait() -> None:
    goodput = TimeAccounting()
    goodput.begin(100.0)
    goodput.resumed(0)
    goodput.stepped(1, 2.0, 0.0, 112.0)  # start-up ends where the first step begins
    goodput.stepped(2, 2.0, 0.0, 114.0)
    goodput.stepped(3, 2.0, 0.5, 116.5)
    goodput.saved(2)
    goodput.stepped(4, 2.0, 0.0, 118.5)
    assert goodput.metrics(118.75)["seconds_useful"] == 8.25, "the step that runs counts, for now"
    goodput.ended(False, 119.0)  # lost in the middle of step 5
    goodput.enter("waiting", 120.0)
    goodput.enter("restart", 130.0)
    goodput.resumed(2)
    goodput.stepped(3, 2.0, 0.0, 135.0)
    goodput.stepped(4, 2.0, 0.0, 137.0)
    goodput.ended(True, 137.75)
    metrics = goodput.metrics(137.75)
    assert metrics["seconds_startup"] == 10.0
    assert metrics["seconds_checkpoint"] == 0.5 + 0.75, "a planned end is a checkpoint"
    assert metrics["seconds_waiting"] == 10.0
    assert metrics["seconds_restart"] == 1.0 + 3.0
    assert metrics["seconds_lost"] == 2.0 + 2.0 + 0.5, "steps 3 and 4, and half a fifth"
    assert metrics["seconds_useful"] == 4 * 2.0, "steps 1 to 4, once each"
    assert metrics["seconds_total"] == 37.75
    assert metrics["goodput"] == pytest.approx(8 / 37.75)
    assert metrics["steps_lost"] == 2


def test_a_killed_driver_costs_its_absence_and_a_stopped_one_nothing(tmp_path: Path) -> None:
    path = tmp_path / "account.json"
    for stopped, restart in ((False, 50.0), (True, 0.0)):
        goodput = TimeAccounting()
        goodput.begin(0.0)
        goodput.stepped(1, 1.0, 0.0, 5.0)
        goodput.ended(True, 10.0)
        goodput.stopped = stopped
        goodput.recoveries.append(Recovery("a", False, 1.0, 2.0, marks={"joined": 3.0}))
        goodput.save(path)
        again = TimeAccounting.load(path)
        again.begin(60.0)
        assert again.metrics(60.0)["seconds_restart"] == restart
        assert again.recoveries == goodput.recoveries
    path.write_text("{torn")
    assert TimeAccounting.load(path) == TimeAccounting()


STORY = st.lists(
    st.tuples(
        st.sampled_from(["step", "stall", "save", "loss", "wait", "form"]), st.floats(0, 100, allow_nan=False)
    ),
    max_size=60,
)


@given(STORY)
def test_seconds_by_cause_add_up_to_all_seconds(story: list[tuple[str, float]]) -> None:
    goodput, now, step, saved = TimeAccounting(), 1000.0, 0, 0
    goodput.begin(now)
    for what, seconds in story:
        now += seconds
        if what in ("step", "stall"):
            if goodput.state != "training":
                goodput.resumed(step)
            step += 1
            goodput.stepped(step, seconds, 1.5 if what == "stall" else 0.0, now)
        elif what == "save":
            saved = step
            goodput.saved(saved)
        elif what == "loss":
            goodput.ended(seconds > 50, now)
            step = saved
        elif goodput.state != "training":
            goodput.enter("waiting" if what == "wait" else "restart", now)
    metrics = goodput.metrics(now)
    parts = [
        value for name, value in metrics.items() if name.startswith("seconds_") and name != "seconds_total"
    ]
    assert sum(parts) == pytest.approx(now - 1000.0, abs=1e-6)
    assert min(parts) >= -1e-9
    assert 0.0 <= metrics["goodput"] <= 1.0


@pytest.mark.parametrize(
    "text", ["", "garbage", "[]", "{}", '{"recoveries": 7, "_recent": {}}', '{"mood": 1}']
)
def test_a_damaged_account_begins_anew_and_says_so(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "goodput.json"
    path.write_text(text)
    assert TimeAccounting.load(path) == TimeAccounting()
    assert str(path) in caplog.text
    assert TimeAccounting.load(tmp_path / "none") == TimeAccounting()


def test_the_last_account_is_recorded_beside_one_of_the_same_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spool has one record for each step of a channel, and the steps of accounts are seconds."""
    spool = Spool(tmp_path)

    def record(event: dict[str, Any]) -> None:
        if event["kind"] == "metrics":
            spool.append("run", event["step"], event["values"], channel=event["channel"])

    monitor = RunMonitor("pretrain", 10, tmp_path / "goodput.json", record)
    clock = SimpleNamespace(time=iter((100.0, 107.2, 107.9)).__next__)
    monkeypatch.setattr(run_monitor, "time", clock)
    monitor.begin()
    for last in (False, True):
        monitor.account(last=last)
    accounts = [(one["step"], one["metrics"]["seconds_total"]) for one in spool.history("run", "goodput")]
    assert accounts == [(7, pytest.approx(7.2)), (8, pytest.approx(7.9))]
