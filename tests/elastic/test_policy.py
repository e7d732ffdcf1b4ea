"""Decisions as tables and properties; the controller and the simulator share them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.policy import (
    MAX_STALLED_ATTEMPTS,
    Budget,
    Form,
    JobView,
    Keep,
    SeatView,
    Wait,
    Yield,
    checkpoint_interval,
    decide,
    mtbf,
    useful_workers,
)


def seats(number: int, leaving: tuple[int, ...] = ()) -> tuple[SeatView, ...]:
    return tuple(SeatView(f"s{index}", f"n{index}", index in leaving) for index in range(number))


RUNNING = JobView(
    workers=(1, 3),
    num_blocks=5,
    seats=seats(2),
    group=("s0", "s1"),
    stepped=True,
    since_resize_s=1000.0,
    step_s=1.0,
    steps_left=1000,
)
ALONE = replace(RUNNING, group=(), step_s=None)


def test_survivors_go_on_at_once_without_waiting_for_machines_that_are_gone() -> None:
    assert decide(replace(ALONE, seats=seats(1), warming=2)) == Form(("s0",))
    assert decide(replace(ALONE, seats=(), warming=2)) == Wait("0 of at least 1 workers have a machine")
    assert decide(replace(ALONE, workers=(2, 3), seats=seats(2, leaving=(1,)))) == Wait(
        "1 of at least 2 workers have a machine"
    )


def test_before_the_first_step_a_second_worker_is_waited_for_as_long_as_a_restart_takes() -> None:
    cold = replace(ALONE, stepped=False, seats=seats(1), warming=1)
    assert isinstance(decide(cold), Wait)
    assert decide(replace(cold, waited_s=cold.restart_s)) == Form(("s0",))
    assert decide(replace(cold, warming=0)) == Form(("s0",)), "nothing to wait for"
    assert decide(replace(cold, num_blocks=1)) == Form(("s0",)), "a second worker would have nothing to do"


def test_notice_is_taken_once_and_at_once() -> None:
    noticed = replace(RUNNING, seats=seats(2, leaving=(1,)), since_resize_s=0.0)
    assert decide(noticed) == Yield("notice for 1 of 2 workers")
    assert decide(replace(noticed, yielding=True)) == Keep()
    assert decide(replace(noticed, group=("s0",))) == Keep(), "a machine that the group does not use may go"


def test_growth_must_be_worth_its_restart() -> None:
    room = replace(RUNNING, seats=seats(3))
    assert decide(room) == Yield("growth from 2 to 3 workers")
    assert decide(replace(room, steps_left=10)) == Keep(), "too late to earn it"
    assert decide(replace(room, since_resize_s=1.0)) == Keep(), "just formed"
    assert decide(replace(room, since_resize_s=5.0, resize_share=1.0)) == Yield("growth from 2 to 3 workers")
    assert decide(replace(room, num_blocks=4)) == Keep(), (
        "the slowest of 3 workers has 2 of 4 blocks, as of 2"
    )
    assert decide(replace(room, step_s=None)) == Keep(), "nobody knows what a step takes"
    assert decide(replace(room, seats=seats(3, leaving=(2,)))) == Keep()


@given(st.integers(1, 64), st.integers(1, 12), st.integers(0, 12), st.integers(1, 24))
def test_useful_workers_are_the_fewest_that_are_as_fast(
    blocks: int, fewest: int, more: int, there: int
) -> None:
    view = replace(ALONE, workers=(fewest, fewest + more), num_blocks=blocks)
    available = max(there, fewest)
    chosen = useful_workers(available, view)
    fastest = min(-(-blocks // workers) for workers in range(1, min(available, fewest + more) + 1))
    assert -(-blocks // chosen) == fastest
    assert fewest <= chosen <= max(fewest, min(available, fewest + more))
    assert chosen == fewest or -(-blocks // (chosen - 1)) > fastest


def test_checkpoint_interval_follows_young_within_limits() -> None:
    assert checkpoint_interval(0.5, 3600.0) == pytest.approx(60.0)
    assert checkpoint_interval(1e-9, 60.0) == 2.0
    assert checkpoint_interval(60.0, 1e6) == 600.0
    assert mtbf(0.0, 0) == 3600.0
    assert mtbf(3600.0, 8) == pytest.approx(800.0), "losses seen shorten it"


def test_machines_that_go_never_end_a_job_and_the_same_failure_twice_does() -> None:
    budget = Budget(max_failures=3)
    for _ in range(1000):
        budget.preempted()
    assert not budget.failed(7, "ValueError")
    assert not budget.failed(8, "ValueError"), "it got further"
    assert budget.failed(8, "ValueError"), "it would come a third time"
    many = Budget(max_failures=2)
    assert [many.failed(step, "ValueError") for step in range(3)] == [False, False, True]


def test_processes_that_die_end_a_job_only_while_it_gets_nowhere() -> None:
    budget = Budget(max_failures=0)
    for step in range(100):
        assert not budget.broke("SIGKILL")
        budget.progress(step)
    answers = [budget.broke("SIGKILL") for _ in range(MAX_STALLED_ATTEMPTS)]
    assert answers == [False] * (MAX_STALLED_ATTEMPTS - 1) + [True]
    budget.progress(99)
    assert budget.broke("SIGKILL"), "a step that was done before is no progress"


def test_a_group_larger_than_it_may_be_gives_workers_up() -> None:
    """As when other students need them more; a limit that was lowered before is not noticed a second time."""
    lowered = replace(RUNNING, workers=(1, 1), since_resize_s=0.0)
    assert decide(lowered) == Yield("from 2 to 1 workers, others need them more")
    assert decide(replace(lowered, yielding=True)) == Keep()
    assert decide(replace(lowered, step_s=None)) == Yield("from 2 to 1 workers, others need them more")
    assert decide(replace(lowered, steps_left=5, restart_s=5.0)) == Keep(), "its end frees them as soon"
    assert decide(replace(lowered, group=(), step_s=None)) == Form(("s0",))
