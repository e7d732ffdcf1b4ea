"""Which slots find room on which machines of a trace, when they are ready, and what is paid for them."""

from __future__ import annotations

import math

import pytest

from orchestrator.elastic.worker_pool import IDLE_S, SlotState
from orchestrator.simulation.machines import Machines
from orchestrator.simulation.prediction import SimulatedStage, predict

from .conftest import EXACT, machines, stage, steady


def ready_on(there: Machines) -> list[str]:
    return [slot.node for slot in there.pool.slots.values() if slot.state is SlotState.READY]


def in_state(there: Machines, state: SlotState) -> int:
    return sum(slot.state is state for slot in there.pool.slots.values())


def test_a_slot_waits_for_room_and_then_for_its_start() -> None:
    there = Machines(machines([(0, "up", 0), (50, "up", 1)], 2, slots=2))
    there.advance(4.0)
    there.request("job", (1, 3), 8.0)
    assert (in_state(there, SlotState.STARTING), in_state(there, SlotState.REQUESTED)) == (2, 1)
    assert there.next_time() == 12.0
    there.advance(12.0)
    assert ready_on(there) == ["0", "0"]
    assert there.next_time() == 50.0
    there.advance(50.0)
    assert there.next_time() == 58.0
    there.advance(58.0)
    assert ready_on(there) == ["0", "0", "1"]
    assert there.next_time() == math.inf


def test_a_machine_that_announced_its_end_gets_no_slot_and_its_own_are_replaced() -> None:
    trace = machines([(0, "up", 0), (0, "up", 1), (0, "up", 2), (20, "notice", 0, 40.0), (40, "down", 0)], 3)
    there = Machines(trace)
    there.advance(0.0)
    there.request("job", (1, 2), 8.0)
    there.advance(8.0)
    assert ready_on(there) == ["0", "1"]
    assert there.advance(20.0) == []
    there.advance(28.0)
    assert ready_on(there) == ["0", "1", "2"]
    assert [slot.node for slot in there.pool.available("job")] == ["1", "2"]
    assert [slot.node for slot in there.advance(40.0)] == ["0"]
    assert in_state(there, SlotState.REQUESTED) == 0


def test_room_on_a_machine_that_announced_its_end_is_no_room() -> None:
    there = Machines(
        machines([(0, "up", 0), (5, "notice", 0, 90.0), (50, "up", 1), (90, "down", 0)], 2, slots=2)
    )
    there.advance(0.0)
    there.request("first", (1, 1), 8.0)
    there.advance(5.0)
    there.request("second", (1, 1), 8.0)
    assert in_state(there, SlotState.REQUESTED) == 2, "one for the second job, one for the slot that will go"
    there.advance(50.0)
    there.advance(58.0)
    assert sorted(ready_on(there)) == ["0", "1", "1"]


def test_a_slot_whose_machine_goes_while_it_starts_is_asked_for_again() -> None:
    trace = machines([(0, "up", 0), (4, "down", 0), (6, "up", 0)], 1)
    there = Machines(trace)
    there.advance(0.0)
    there.request("job", (1, 1), 8.0)
    assert len(there.advance(4.0)) == 1
    there.advance(8.0)
    assert ready_on(there) == [], "the first one is not"
    there.advance(16.0)
    assert ready_on(there) == ["0"]


def test_machines_of_idle_slots_have_room_again() -> None:
    there = Machines(machines([(0, "up", 0), (20, "notice", 0, 200.0), (200, "down", 0), (0, "up", 1)], 2))
    there.advance(0.0)
    there.request("first", (1, 2), 0.0)
    there.advance(0.0)
    there.withdraw("first", 10.0)
    there.advance(10.0 + IDLE_S + 1.0)
    assert not there.pool.slots
    there.request("second", (1, 2), 8.0)
    assert [slot.node for slot in there.pool.slots.values()] == ["1", ""], "the other one is about to go"


def test_a_job_that_ends_takes_its_requests_with_it() -> None:
    there = Machines(machines([(10, "up", 0)], 1))
    there.request("job", (1, 1), 8.0)
    there.withdraw("job", 5.0)
    there.advance(10.0)
    assert not there.pool.slots
    assert there.bill(20.0) == (0.0, 0.0)


def test_a_machine_is_paid_for_from_its_first_slot_until_it_goes() -> None:
    there = Machines(machines([(0, "up", 0), (0, "up", 1), (3600, "down", 0)], 2, price=2.0))
    there.advance(0.0)
    there.request("job", (1, 1), 8.0)
    there.advance(1800.0)
    assert there.bill(1800.0) == (pytest.approx(1.0), pytest.approx(0.5))
    there.advance(3600.0)
    assert there.bill(5400.0) == (pytest.approx(2.0 + 1.0), pytest.approx(1.0 + 0.5))


def test_all_jobs_of_the_first_stage_find_ready_slots_if_it_is_warm() -> None:
    jobs = tuple(
        job for name in ("a", "b") for job in stage(steps=10, blocks=1, workers=(1, 1), name=name).jobs
    )
    found = predict([SimulatedStage("distill", "distill", jobs, EXACT)], steady(2), warm=True)
    assert [job.account.startup for job in found.stages[0].jobs] == [1.0, 1.0]
    cold = predict([SimulatedStage("distill", "distill", jobs, EXACT)], steady(2))
    assert [job.account.startup for job in cold.stages[0].jobs] == [9.0, 9.0]
