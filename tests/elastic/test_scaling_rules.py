"""When a job starts a group, resizes it or waits, as tables and properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.elastic.scaling_rules import (
    JobScaling,
    JobView,
    Keep,
    RequestStop,
    Start,
    Wait,
    decide,
    holds_for_s,
    useful_workers,
)
from orchestrator.elastic.worker_pool import Demand, Slot, WorkerPool


def slots(number: int, leaving: tuple[int, ...] = ()) -> tuple[Slot[str], ...]:
    return tuple(Slot(f"s{index}", "cpu", leaving=index in leaving) for index in range(number))


RUNNING = JobView(
    workers=(1, 3),
    num_blocks=5,
    slots=slots(2),
    group=("s0", "s1"),
    stepped=True,
    since_resize_s=1000.0,
    step_s=1.0,
    steps_left=1000,
)
ALONE = replace(RUNNING, group=(), step_s=None)


def test_survivors_go_on_at_once_without_waiting_for_machines_that_are_gone() -> None:
    assert decide(replace(ALONE, slots=slots(1), starting=2)) == Start(("s0",))
    assert decide(replace(ALONE, slots=(), starting=2)) == Wait("0 of at least 1 workers have a machine")
    assert decide(replace(ALONE, workers=(2, 3), slots=slots(2, leaving=(1,)))) == Wait(
        "1 of at least 2 workers have a machine"
    )


def test_before_the_first_step_a_second_worker_is_waited_for_as_long_as_a_restart_takes() -> None:
    cold = replace(ALONE, stepped=False, slots=slots(1), starting=1)
    assert isinstance(decide(cold), Wait)
    assert decide(replace(cold, waited_s=cold.restart_s)) == Start(("s0",))
    assert decide(replace(cold, starting=0)) == Start(("s0",)), "nothing to wait for"
    assert decide(replace(cold, num_blocks=1)) == Start(("s0",)), "a second worker would have nothing to do"


def test_notice_is_taken_once_and_at_once() -> None:
    noticed = replace(RUNNING, slots=slots(2, leaving=(1,)), since_resize_s=0.0)
    assert decide(noticed) == RequestStop("notice for 1 of 2 workers")
    assert decide(replace(noticed, stopping=True)) == Keep()
    assert decide(replace(noticed, group=("s0",))) == Keep(), "a machine that the group does not use may go"


def test_growth_must_be_worth_its_restart() -> None:
    room = replace(RUNNING, slots=slots(3))
    assert decide(room) == RequestStop("growth from 2 to 3 workers")
    assert decide(replace(room, steps_left=10)) == Keep(), "too late to earn it"
    assert decide(replace(room, since_resize_s=1.0)) == Keep(), "just started"
    assert decide(replace(room, since_resize_s=5.0, resize_share=1.0)) == RequestStop(
        "growth from 2 to 3 workers"
    )
    assert decide(replace(room, num_blocks=4)) == Keep(), (
        "the slowest of 3 workers has 2 of 4 blocks, as of 2"
    )
    assert decide(replace(room, step_s=None)) == Keep(), "nobody knows what a step takes"
    assert decide(replace(room, slots=slots(3, leaving=(2,)))) == Keep()


@given(st.integers(1, 64), st.integers(1, 12), st.integers(0, 12), st.integers(1, 24))
def test_useful_workers_are_the_smallest_number_that_is_as_fast(
    blocks: int, minimum: int, more: int, there: int
) -> None:
    view = replace(ALONE, workers=(minimum, minimum + more), num_blocks=blocks)
    available = max(there, minimum)
    chosen = useful_workers(available, view)
    fastest = min(-(-blocks // workers) for workers in range(1, min(available, minimum + more) + 1))
    assert -(-blocks // chosen) == fastest
    assert minimum <= chosen <= max(minimum, min(available, minimum + more))
    assert chosen == minimum or -(-blocks // (chosen - 1)) > fastest


def test_a_group_larger_than_it_may_be_gives_workers_up() -> None:
    """As when other students need them more; a limit that was lowered before is not noticed a second time."""
    lowered = replace(RUNNING, workers=(1, 1), since_resize_s=0.0)
    assert decide(lowered) == RequestStop("from 2 to 1 workers, others need them more")
    assert decide(replace(lowered, stopping=True)) == Keep()
    assert decide(replace(lowered, step_s=None)) == RequestStop("from 2 to 1 workers, others need them more")
    assert decide(replace(lowered, steps_left=5, restart_s=5.0)) == Keep(), "its end frees them as soon"
    assert decide(replace(lowered, group=(), step_s=None)) == Start(("s0",))


# --- how long a decision holds --------------------------------------------------------------------------------


def later(view: JobView, seconds: float) -> JobView:
    """The same, so much later, if nothing happens meanwhile."""
    return replace(
        view,
        waited_s=view.waited_s + seconds,
        since_resize_s=view.since_resize_s + seconds * bool(view.group),
    )


@given(
    there=st.integers(0, 5),
    leaving=st.sets(st.integers(0, 4), max_size=2),
    starting=st.integers(0, 2),
    group=st.integers(0, 4),
    workers=st.tuples(st.integers(1, 3), st.integers(0, 3)).map(lambda pair: (pair[0], sum(pair))),
    waited_s=st.floats(0, 20),
    since_s=st.floats(0, 200),
    restart_s=st.floats(0.1, 20),
    share=st.sampled_from([0.01, 0.1, 1.0]),
    stepped=st.booleans(),
)
def test_a_decision_holds_as_long_as_it_says_and_no_longer(
    there: int,
    leaving: set[int],
    starting: int,
    group: int,
    workers: tuple[int, int],
    waited_s: float,
    since_s: float,
    restart_s: float,
    share: float,
    stepped: bool,
) -> None:
    """A simulation asks again only then, so anything that changes sooner would go unseen."""
    view = JobView(
        workers=workers,
        num_blocks=6,
        slots=slots(there, leaving=tuple(leaving)),
        group=tuple(f"s{index}" for index in range(min(group, there))),
        starting=starting,
        stepped=stepped,
        waited_s=waited_s,
        since_resize_s=since_s,
        step_s=1.0,
        steps_left=10_000,
        restart_s=restart_s,
        resize_share=share,
    )
    decision = decide(view)
    holds = holds_for_s(view, decision)
    assert holds >= 0
    for part in (0.0, 0.5, 0.99):
        assert decide(later(view, part * min(holds, 1e6) - 1e-9 * (part > 0))) == decision
    if math.isfinite(holds) and isinstance(decision, Wait):
        assert isinstance(decide(later(view, holds + 1e-6)), Start)
    if math.isinf(holds):
        assert decide(later(view, 1e9)) == decision


def test_growth_is_looked_at_again_when_its_share_of_the_time_is_there() -> None:
    young = replace(RUNNING, slots=slots(3), since_resize_s=10.0, restart_s=5.0, resize_share=0.1)
    assert decide(young) == Keep()
    assert holds_for_s(young, Keep()) == pytest.approx(40.0)
    assert decide(later(young, 40.0)) == RequestStop("growth from 2 to 3 workers")


# --- what a job learns ----------------------------------------------------------------------------------------


def job_on(num_slots: int, workers: tuple[int, int] = (1, 2)) -> tuple[JobScaling, WorkerPool[str]]:
    pool: WorkerPool[str] = WorkerPool()
    pool.request("job", Demand(*workers, "cpu"))
    job = JobScaling("job", pool, workers, num_blocks=2, num_steps=1000, resize_share=0.1, now=0.0)
    make_ready(pool, num_slots, 0.0)
    return job, pool


def make_ready(pool: WorkerPool[str], number: int, now: float) -> None:
    for slot in [slot for slot in pool.slots.values() if not slot.node][:number]:
        pool.placed(slot.name, f"node of {slot.name}")
        pool.ready(slot.name, now)


def run_group(job: JobScaling, pool: WorkerPool[str], now: float) -> None:
    decision = job.decide(now)
    assert isinstance(decision, Start), decision
    assert pool.acquire("job", decision.slots, now) is not None
    job.group_started(decision.slots, now)


def test_a_job_learns_what_a_restart_takes() -> None:
    job, pool = job_on(2)
    run_group(job, pool, 0.0)
    job.stepped(1, 1.0, 30.0)
    assert job.restart_s == 5.0, "the first start is not a restart"
    job.stop_requested("growth")
    assert job.decide(31.0) == Keep(), "asked once"
    job.group_ended(40.0, lost=False)
    run_group(job, pool, 41.0)
    job.stepped(2, 1.0, 43.0)
    assert job.restart_s == pytest.approx(0.5 * 5.0 + 0.5 * 3.0)
    job.stepped(3, 1.0, 44.0)
    assert job.restart_s == pytest.approx(4.0), "the group's first step only"


def test_waiting_for_machines_is_no_part_of_what_a_restart_takes() -> None:
    """Otherwise an hour without machines would keep a job from growing for half a day."""
    job, pool = job_on(2)
    run_group(job, pool, 0.0)
    job.stepped(10, 1.0, 10.0)
    pool.lose(list(pool.slots))
    job.group_ended(20.0, lost=True)
    assert isinstance(job.decide(20.0), Wait)
    make_ready(pool, 1, 3600.0)
    run_group(job, pool, 3600.0)
    job.stepped(10, 1.0, 3603.0)
    assert job.restart_s == pytest.approx(0.5 * 5.0 + 0.5 * 3.0)


def test_a_wait_for_more_workers_begins_anew_when_the_first_ones_went() -> None:
    job, pool = job_on(1)
    pool.placed(list(pool.slots)[1], "slow")
    assert isinstance(job.decide(0.0), Wait)
    pool.lose([next(iter(pool.slots))])
    assert isinstance(job.decide(1.0), Wait)
    make_ready(pool, 1, 100.0)
    assert isinstance(job.decide(100.0), Wait), "the other is about to be ready still"
    assert isinstance(job.decide(106.0), Start)


def test_a_lost_group_counts_and_its_slots_are_free_again() -> None:
    job, pool = job_on(2)
    run_group(job, pool, 0.0)
    job.stepped(7, 2.0, 10.0)
    assert (job.view(10.0).step_s, job.view(10.0).steps_left) == (2.0, 993)
    job.stepped(8, 4.0, 14.0)
    assert job.view(14.0).step_s == pytest.approx(2.6), "one slow step says little"
    assert job.mtbf_s(100.0) == 3700.0
    job.group_ended(100.0, lost=True)
    assert job.mtbf_s(100.0) == pytest.approx(1850.0)
    assert not any(slot.job for slot in pool.slots.values())
    assert job.view(100.0).group == ()
    assert job.view(100.0).step_s is None, "the next group may have another size"
    job.group_ended(200.0, lost=False)
    assert job.mtbf_s(200.0) == pytest.approx(1900.0), "a planned end is not a loss"
