"""How `python -m bench recover` orders its arms and what it reads from their files; nothing is timed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import recover
from bench.recover import Change, Measured


def steps(*numbers: int, since: float) -> list[dict[str, float]]:
    """Steps, one a second."""
    return [{"time": since + place, "step": step, "world": 2} for place, step in enumerate(numbers)]


def recovery(planned: bool, last_step: float, first_step: float, resumed_at: int) -> dict[str, Any]:
    return {
        "planned": planned,
        "last_step": last_step,
        "detected": last_step + 0.5,
        "decided": last_step + 0.75,
        "marks": {"joined": last_step + 1.0, "built": last_step + 1.25, "restored": last_step + 1.5},
        "first_step": first_step,
        "resumed_at": resumed_at,
    }


def test_every_arm_has_its_turns_and_no_arm_always_comes_first() -> None:
    sessions = recover.plan(quick=False, baseline=True)
    kills = [arm for arm, what in sessions if what == "kill"]
    assert Counter(kills) == {"warm": 7, "baseline": 7, "stock group": 3, "untouched": 3}
    assert {kills[0], kills[4]} == {"warm", "baseline"}
    stages = [arm for arm, what in sessions if what == "stages"]
    assert stages == ["warm", "baseline"] * 2
    without = recover.plan(quick=True, baseline=False)
    assert Counter(arm for arm, _ in without) == {"warm": 3, "stock group": 1, "untouched": 1}


def test_a_kill_counts_from_the_kill_and_its_parts_add_up() -> None:
    done = steps(1, 2, 3, since=100.0) + steps(2, 3, since=105.0)
    account = [recovery(False, 102.0, 104.9, 1)]
    change = recover.from_account(account, done, 102.2, planned=False)
    assert change.seconds == pytest.approx(2.7)
    assert sum(change.parts.values()) == pytest.approx(change.seconds)
    assert change.lost == 2


def test_growth_counts_from_step_to_step_and_is_found_among_others() -> None:
    done = steps(1, 2, 3, since=100.0) + steps(4, 5, since=104.0) + steps(6, since=107.0)
    account = [recovery(True, 102.0, 103.9, 3), recovery(True, 105.0, 106.9, 5)]
    growth = recover.from_account(account, done, 101.0, planned=True)
    drain = recover.from_account(account, done, 104.5, planned=True)
    assert (growth.seconds, growth.lost) == (pytest.approx(1.9), 0)
    assert (drain.seconds, drain.lost) == (pytest.approx(1.9), 0)
    with pytest.raises(RuntimeError, match="no sudden change"):
        recover.from_account(account, done, 101.0, planned=False)


def test_an_arm_without_an_account_is_read_from_its_steps() -> None:
    # Step 3 was almost done when the machine died.
    done = steps(1, 2, 3, since=100.0) + steps(2, 3, since=170.0)
    assert recover.from_steps(done, 101.9) == Change(pytest.approx(68.1), 2)


def test_a_line_that_is_being_written_is_no_entry_yet(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    assert recover.read_lines(file) == []
    file.write_text(json.dumps({"step": 1}) + '\n{"step": ')
    assert recover.read_lines(file) == [{"step": 1}]


def test_the_claim_compares_medians() -> None:
    measured = {
        "warm": Measured(
            [
                Change(2.0, 3, {"detect": 0.5}),
                Change(2.5, 5, {"detect": 1.0}),
                Change(9.0, 4, {"detect": 0.7}),
            ],
            [Change(1.5, 0)],
            [Change(1.0, 0)],
            [2.0, 3.0],
            [4.0],
        ),
        "stock group": Measured([Change(8.0, 1)], memory_gib=[3.0]),
        "untouched": Measured([Change(80.0, 2), Change(90.0, 2)], memory_gib=[3.0]),
        "baseline": Measured([Change(2.0, 1), Change(2.0, 1)], memory_gib=[3.0]),
    }
    claim = recover.claim(measured, "abc1234")
    assert (claim.figure, claim.unit, claim.goal, claim.met) == (2.5, "s", 3.0, True)
    assert claim.arms["untouched"].median == 85.0
    assert claim.arms["warm: detect"].median == 0.7
    assert claim.arms["warm: growth, pause"].n == 1
    assert claim.arms["warm: end of a stage to the next one's first step"].median == 2.5
    assert "baseline: growth, pause" not in claim.arms
    notes = "\n".join(claim.notes)
    assert "2.9% of untouched" in notes
    assert "1.25 times the baseline (abc1234)" in notes
    assert (
        "warm: steps lost, median: 4 (worst 5) at a kill, 0 (worst 0) at growth, 0 (worst 0) at a drain"
        in notes
    )
