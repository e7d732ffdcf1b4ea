"""Costs from what a run left behind."""

from __future__ import annotations

from typing import Any

import pytest

from bench._measure import Measured, stage_costs
from orchestrator.simulation.costs import StageCosts

# Two workers step every 2 s from second 110 on; one is killed at 125; one worker goes on, every 4 s.
STEPS = [(110.0 + 2 * i, 1 + i) for i in range(8)] + [(132.0 + 4 * i, 7 + i) for i in range(5)]
WORKERS = [(105.0, 2.0), (112.0, 2.0), (123.0, 2.0), (128.0, 1.0), (140.0, 1.0), (150.0, 1.0)]


def recovery(**more: Any) -> dict[str, Any]:
    known = {
        "cause": "lost 1 of 2 workers",
        "planned": False,
        "last_step": 124.0,
        "detected": 126.0,
        "decided": 126.0,
        "marks": {"joined": 126.5, "built": 127.0, "restored": 127.25},
        "first_step": 132.0,
        "resumed_at": 6,
        "workers": 1,
    }
    return known | more


def run() -> Measured:
    return Measured({"goodput": 0.5}, STEPS, WORKERS, stalls=[0.1, 0.2, 0.3], writes=[1.0, 2.0, 9.0])


def test_every_cost_is_found() -> None:
    section = stage_costs(run(), [recovery()], began=100.0, losses=[50.0, 125.0])
    assert section == {
        "stall_s": 0.2,
        "write_s": 2.0,
        "start_s": 1.0,
        "restore_s": 0.25,
        "first_step_s": 132.0 - 127.25 - 4.0,
        "detect_s": 1.0,
        "warm_s": pytest.approx(10.0 - 1.0 - 0.75 - 2.0),
        "measured_step_s": {2: 2.0, 1: 4.0},
    }
    StageCosts.model_validate(section)


def test_a_group_that_waited_for_a_machine_tells_how_long_its_slot_took() -> None:
    waited = recovery(decided=129.0, marks={"built": 130.0, "restored": 130.5})
    section = stage_costs(run(), [waited], began=100.0, arrivals=[90.0, 126.5, 128.9])
    assert section["warm_s"] == 129.0 - 126.5
    assert "detect_s" not in section


def test_a_run_without_losses_leaves_the_rest_to_the_defaults() -> None:
    section = stage_costs(Measured({}, STEPS[:8], WORKERS[:3], [], []), [], began=100.0)
    assert section.keys() == {"warm_s", "measured_step_s"}
    assert section["measured_step_s"] == {2: 2.0}


def test_a_group_that_never_stepped_says_nothing() -> None:
    section = stage_costs(run(), [recovery(marks={"joined": 126.5})], began=100.0)
    assert not {"start_s", "restore_s", "first_step_s"} & section.keys()
