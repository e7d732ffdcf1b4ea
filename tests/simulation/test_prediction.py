"""The simulator against closed forms, a plain-loop reference, and what must hold on any trace."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.simulation import job as job_module
from orchestrator.simulation.costs import StageCosts
from orchestrator.simulation.job import JobPlan
from orchestrator.simulation.prediction import CAUSES, Prediction, SimulatedStage, on_demand, predict
from orchestrator.simulation.trace import Trace
from orchestrator.training.checkpoint import interval
from tools.synthetic import synthetic

from .conftest import EXACT, machines, stage, steady


def account(prediction: Prediction) -> dict[str, float]:
    return prediction.total().metrics()


def seconds(prediction: Prediction) -> dict[str, float]:
    return {cause: account(prediction)[f"seconds_{cause}"] for cause in CAUSES}


# --- closed forms -----------------------------------------------------------------------------------------


def test_without_failures_time_is_exact() -> None:
    # 4 blocks on 4 workers: 0.75 s a step. 4 s around the stage, 8 s to warm up, 1 s to start.
    found = predict([stage(steps=100, interval_s=10.0)], steady(4))
    # The first step takes 1 s. A checkpoint falls due at the first step's end 10 s after the one before: the
    # first one after 1 + 12·0.75 = 10 s, and later ones after 14 steps, 10.5 s: after steps 13, 27, 41 … 97.
    saves = 7
    assert found.finished
    assert seconds(found) == {
        "useful": 100 * 0.75 + 0.25,
        "startup": 8.0 + 1.0,
        "lost": 0.0,
        "checkpoint": saves * 0.125 + 0.125 + 1.0,
        "waiting": 0.0,
        "restart": 0.0,
    }
    assert found.seconds == 4.0 + sum(seconds(found).values())
    assert account(found)["checkpoints"] == saves + 1


@pytest.mark.parametrize(("workers", "slots"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_a_step_takes_as_long_as_the_worker_with_most_blocks(workers: int, slots: int) -> None:
    found = predict([stage(steps=10, workers=(workers, workers), interval_s=1e9)], steady(4))
    assert seconds(found)["useful"] == 10 * (0.25 + slots * 0.5) + 0.25


def test_an_unannounced_loss_costs_the_steps_since_the_checkpoint() -> None:
    # Steps begin at 4+8+1 = 13 s. The first checkpoint is begun at 23 s, after step 13, and written at 24.125 s.
    # It is committed at the end of the second step after that, at 24.625 s. The machine goes at 26 s.
    trace = machines([(0, "up", 0), (0, "up", 1), (26, "down", 1)], 2)
    found = predict([stage(steps=100, blocks=2, workers=(1, 2))], trace)
    metrics = account(found)
    assert metrics["preemptions"] == 1
    assert metrics["steps_lost"] == 3  # steps at 23.875, 24.625 and 25.375 s
    assert metrics["seconds_lost"] == 26 - 23.125
    # two seconds until it is known, one to start, half a one to restore
    assert metrics["seconds_restart"] == 2.0 + 1.0 + 0.5
    # 13 steps on two workers, 87 on one, and two first steps
    assert metrics["seconds_useful"] == 13 * 0.75 + 87 * 1.25 + 2 * 0.25


def test_an_uncommitted_checkpoint_is_of_no_use() -> None:
    # As above, but the machine goes at 24 s, when the checkpoint of 23 s is not written.
    trace = machines([(0, "up", 0), (0, "up", 1), (24, "down", 1)], 2)
    metrics = account(predict([stage(steps=100, blocks=2, workers=(1, 2))], trace))
    assert metrics["steps_lost"] == 14
    assert metrics["seconds_checkpoint"] >= 0.125


def test_notice_in_time_loses_no_step() -> None:
    trace = machines([(0, "up", 0), (0, "up", 1), (19.5, "notice", 1, 26.0), (26, "down", 1)], 2)
    metrics = account(predict([stage(steps=100, blocks=2, workers=(1, 2))], trace))
    assert metrics["preemptions"] == 0
    assert metrics["preemptions_announced"] == 1
    assert metrics["steps_lost"] == metrics["seconds_lost"] == 0
    # the step under way, the ninth, ends at 20 s
    assert metrics["seconds_useful"] == 9 * 0.75 + 91 * 1.25 + 2 * 0.25
    # then it saves (0.125 + 1), starts (1) and restores (0.5)
    assert metrics["seconds_restart"] == 0.125 + 1.0 + 1.0 + 0.5


def test_notice_too_short_loses_like_none() -> None:
    trace = machines([(0, "up", 0), (0, "up", 1), (20, "notice", 1, 20.5), (20.5, "down", 1)], 2)
    metrics = account(predict([stage(steps=100, blocks=2, workers=(1, 2))], trace))
    assert metrics["preemptions"] == 1
    assert metrics["steps_lost"] > 0


def test_growth_loses_no_step_and_pays() -> None:
    trace = machines([(0, "up", 0), (60, "up", 1)], 2)
    found = predict([stage(steps=2000, blocks=2, workers=(1, 2))], trace)
    alone = predict([stage(steps=2000, blocks=2, workers=(1, 1))], trace)
    assert account(found)["resizes"] == 1
    assert account(found)["seconds_lost"] == 0
    assert found.seconds < 0.7 * alone.seconds


def test_growth_that_does_not_pay_is_left() -> None:
    trace = machines([(0, "up", 0), (60, "up", 1)], 2)
    assert account(predict([stage(steps=48, blocks=2, workers=(1, 2))], trace))["resizes"] == 0


def test_a_job_that_may_spend_more_on_growing_grows_sooner() -> None:
    trace = machines([(0, "up", 0), (20, "up", 1)], 2)
    plan = stage(steps=2000, blocks=2, workers=(1, 2))
    (job,) = plan.jobs
    eager = replace(plan, jobs=(replace(job, resize_share=1.0),))
    assert predict([eager], trace).seconds < predict([plan], trace).seconds - 5


def test_growth_comes_when_a_restart_is_a_tenth_of_the_time() -> None:
    # One worker is chosen at 12 s; a restart is believed to take 5 s, so growth may come at 62 s: just then a step
    # ends, the 39th, and the group stops after the next one.
    trace = machines([(0, "up", 0), (20, "up", 1)], 2)
    found = predict([stage(steps=500, blocks=2, workers=(1, 2), interval_s=1e9)], trace)
    assert seconds(found)["useful"] == 40 * 1.25 + 460 * 0.75 + 2 * 0.25


def test_the_first_group_waits_for_a_second_slot_as_long_as_a_restart_takes() -> None:
    # The second machine's slot is ready 4 s after the first one's: that is less than the 5 s that a restart is
    # believed to take. The third one's is not.
    trace = machines([(0, "up", 0), (8, "up", 1), (20, "up", 2)], 3)
    found = predict([stage(steps=10, blocks=6, workers=(1, 3), interval_s=1e9)], trace)
    assert seconds(found)["startup"] == 8.0 + 4.0 + 1.0
    assert seconds(found)["useful"] == 10 * (0.25 + 3 * 0.5) + 0.25


def test_without_machines_it_never_finishes_and_says_so() -> None:
    nothing = predict([stage()], machines([], 2))
    assert not nothing.finished
    assert "no more machines" in nothing.why_not
    assert nothing.cost == 0
    too_few = predict([stage(workers=(3, 4))], steady(2, duration_s=500.0))
    assert not too_few.finished
    assert "trace ends" in too_few.why_not
    assert too_few.seconds == 500
    assert seconds(too_few)["waiting"] == 500 - 4.0


def test_waiting_is_for_fewer_machines_than_the_minimum() -> None:
    trace = machines([(0, "up", 0), (0, "up", 1), (40, "down", 1), (140, "up", 1)], 2)
    found = seconds(predict([stage(steps=100, workers=(2, 2), blocks=2)], trace))
    # until the loss is known it is a restart; from the new machine's coming on, too
    assert found["waiting"] == 100 - 2
    assert found["restart"] == 2 + 8 + 1 + 0.5


def test_cost_is_machine_hours_at_the_price_of_the_hour() -> None:
    trace = machines([(0, "up", 0), (0, "up", 1), (0, "up", 2), (100, "down", 1)], 3, price=3.6)
    found = predict([stage(steps=400, blocks=2, workers=(1, 2), interval_s=1e9)], trace)
    # The third machine is taken, and paid for, when the second is gone.
    paid = (found.seconds - 4.0) + (100 - 4.0) + (found.seconds - 100)
    assert found.cost == pytest.approx(3.6 * paid / 3600)
    assert found.machine_hours == pytest.approx(paid / 3600)


def test_on_demand_is_the_same_work_undisturbed() -> None:
    trace = machines([(0, "up", 0), (50, "down", 0), (500, "up", 0)], 1, slots=2)
    plans = [stage(steps=100, blocks=4, workers=(1, 3))]
    beside = on_demand(plans, trace, 2.0)
    assert beside.finished
    assert account(beside)["goodput"] > account(predict(plans, trace))["goodput"]
    assert beside.machine_hours == pytest.approx(2 * (beside.seconds - 4.0) / 3600)  # 3 workers, 2 a machine
    assert beside.cost == pytest.approx(2.0 * beside.machine_hours)


def test_stages_follow_each_other_and_keep_their_slots() -> None:
    curate = SimulatedStage("curate", "curate", (), EXACT)
    first, second = stage(steps=10, name="a"), stage(steps=10, name="b")
    found = predict([first, second, curate, second], steady(4))
    starts = [job.account.startup for stage in found.stages for job in stage.jobs]
    # warm for the second; 20 s of curating are not long enough to give the machines back
    assert starts == [9.0, 1.0, 1.0]
    long = SimulatedStage("curate", "curate", (), EXACT.model_copy(update={"seconds": 100.0}))
    assert [
        s.jobs[0].account.startup for s in predict([first, long, second], steady(4)).stages if s.jobs
    ] == [9, 9]
    assert [stage.ended for stage in found.stages][:-1] == [stage.began for stage in found.stages][1:]


def test_slots_that_another_stage_left_are_ready() -> None:
    trace = machines([(0, "up", 0), (20, "up", 1)], 2)
    found = predict([stage(steps=200, blocks=2, workers=(1, 2))], trace, warm=True)
    assert seconds(found)["startup"] == 1.0
    cold = predict([stage(steps=200, blocks=2, workers=(2, 2))], trace, warm=True)
    assert seconds(cold)["startup"] == 8.0 + 1.0  # only those that were there
    assert seconds(cold)["waiting"] == 20.0 - 4.0


def test_students_share_the_machines() -> None:
    jobs = tuple(JobPlan(f"distill/{i}", 50, 2, (1, 2), 10.0, EXACT) for i in range(3))
    found = predict([SimulatedStage("distill", "distill", jobs, EXACT)], steady(4))
    assert found.finished
    (distill,) = found.stages
    assert all(job.account.steps_lost == 0 for job in distill.jobs)
    fixed = tuple(replace(job, workers=(1, 1)) for job in jobs)
    one_each = predict([SimulatedStage("distill", "distill", fixed, EXACT)], steady(3))
    alone = predict([stage(steps=50, blocks=2, workers=(1, 1))], steady(1))
    assert one_each.seconds == alone.seconds


def test_a_student_below_its_minimum_gets_a_worker_back() -> None:
    # Both have two workers; then two machines go, and both are those of the second one.
    jobs = tuple(JobPlan(f"distill/{i}", 200, 2, (1, 2), 10.0, EXACT) for i in range(2))
    events = [*((0.0, "up", machine) for machine in range(4)), (60.0, "down", 2), (60.0, "down", 3)]
    found = predict([SimulatedStage("distill", "distill", jobs, EXACT)], machines(events, 4))
    first, second = (job.account for job in found.stages[0].jobs)
    assert (first.preemptions, first.preemptions_announced, first.lost) == (0, 1, 0)
    assert second.preemptions == 1
    assert second.waiting < 5  # until the first has saved its step


# --- Young and Daly ---------------------------------------------------------------------------------------


def daly_s(work_s: float, interval_s: float, save_s: float, restart_s: float, mtbf_s: float) -> float:
    """Expected time with exponential failures that hit restarts, too (Daly, FGCS 22, 2006, equation 13)."""
    segments = work_s / interval_s
    return mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + save_s) / mtbf_s) * segments


@pytest.mark.parametrize("interval_s", [20.0, 60.0, 200.0])
def test_poisson_failures_cost_what_daly_says(interval_s: float) -> None:
    """A machine that is back at once after failing at random: mean of 40 runs within three standard errors."""
    mtbf_s, work_s, step_s, save_s = 300.0, 6000.0, 0.25, 2.0
    # The model has no background writing, and what follows a failure takes no time but the restart.
    costs = StageCosts(
        block_s=step_s,
        step_s=0,
        stall_s=save_s,
        write_s=0,
        detect_s=6,
        start_s=0,
        restore_s=4,
        first_step_s=0,
        warm_s=0,
        overhead_s=0,
    )
    times = []
    for seed in range(40):
        draw = random.Random(seed)
        ends = itertools.accumulate(draw.expovariate(1 / mtbf_s) for _ in range(400))
        events = [(0.0, "up", 0)]
        for end in ends:
            events += [(end, "down", 0), (end, "up", 0)]
        plan = stage(steps=int(work_s / step_s), blocks=1, workers=(1, 1), interval_s=interval_s, costs=costs)
        found = predict([plan], machines(events, 1))
        assert found.finished
        times.append(found.seconds)
    expected = daly_s(work_s, interval_s, save_s, 10.0, mtbf_s)
    error = statistics.stdev(times) / math.sqrt(len(times))
    # A checkpoint counts from the next step's end on, and restarts after nothing was saved restore nothing.
    slack = 0.01 * expected
    assert abs(statistics.mean(times) - expected) < 3 * error + slack


def test_the_engines_interval_is_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Young's interval loses at most a few percent against the best of a grid, on a trace with many failures."""
    monkeypatch.setattr(interval, "PRIOR_MTBF_S", 300.0)
    trace = synthetic("y", count=4, duration_s=1e6, mean_up_s=1200, mean_down_s=30, notice_share=0, seed=3)
    costs = EXACT.model_copy(update={"stall_s": 1.0, "block_s": 0.05, "step_s": 0.05, "write_s": 0.5})

    def goodput(interval_s: float | None) -> float:
        plan = stage(steps=40_000, workers=(1, 4), interval_s=interval_s, costs=costs)
        return account(predict([plan], trace))["goodput"]

    best = max(goodput(interval_s) for interval_s in (2, 5, 10, 20, 40, 80, 160, 320))
    assert goodput(None) > 0.97 * best
    assert goodput(320) < 0.85 * best  # so the grid tells intervals apart


# --- on any trace -----------------------------------------------------------------------------------------


@st.composite
def storms(draw: st.DrawFn, durations: tuple[float, ...] = (100.0, 1000.0, 5000.0)) -> Trace:
    return synthetic(
        "storm",
        count=draw(st.integers(1, 6)),
        duration_s=draw(st.sampled_from(durations)),
        mean_up_s=draw(st.sampled_from([20.0, 100.0, 1000.0])),
        mean_down_s=draw(st.sampled_from([1.0, 50.0, 500.0])),
        notice_s=draw(st.sampled_from([0.5, 5.0, 60.0])),
        notice_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        slots=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def stages(draw: st.DrawFn) -> SimulatedStage:
    min_workers = draw(st.integers(1, 3))
    workers = (min_workers, min_workers + draw(st.integers(0, 4)))
    steps, blocks = draw(st.integers(1, 600)), draw(st.integers(1, 9))
    interval_s = draw(st.sampled_from([None, 0.5, 3.0, 30.0]))
    costs = EXACT.model_copy(
        update={
            "stall_s": draw(st.sampled_from([0.0, 0.1, 3.0])),
            "write_s": draw(st.sampled_from([0.0, 0.7, 9.0])),
            "step_s": draw(st.sampled_from([0.01, 0.3, 20.0])),
        }
    )
    students = draw(st.integers(1, 3))
    jobs = tuple(JobPlan(f"s/{i}", steps, blocks, workers, interval_s, costs) for i in range(students))
    return SimulatedStage("s", "distill", jobs, costs)


@pytest.mark.heavy
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(storms(), st.lists(stages(), min_size=1, max_size=3))
def test_seconds_add_up_and_twice_is_the_same(trace: Trace, plans: list[SimulatedStage]) -> None:
    found = predict(plans, trace)
    assert found == predict(plans, trace)
    assert found.seconds <= trace.duration_s
    for result in found.stages:
        for job in result.jobs:
            metrics = job.account
            assert all(getattr(metrics, cause) >= 0 for cause in CAUSES)
            end = job.ended if job.ended is not None else found.seconds
            began = result.began + EXACT.overhead_s
            assert metrics.total == pytest.approx(end - began, abs=1e-6)
            assert job.steps == job.num_steps or not found.finished
            assert (metrics.lost > 0) >= (metrics.steps_lost > 0)
            if not metrics.preemptions:
                assert metrics.lost == 0
    assert found.cost == pytest.approx(found.machine_hours)  # at 1 an hour
    assert found.machine_hours <= len(trace.machines) * found.seconds / 3600 + 1e-9


@settings(max_examples=150, deadline=None)
@example(
    at=32.0, short=0.0, more=2.0, interval_s=10.0, write_s=8.0
)  # a stop must not give up what is being written
@given(
    at=st.floats(20, 200),
    short=st.floats(0, 60),
    more=st.floats(0, 60),
    interval_s=st.sampled_from([2.0, 10.0, 50.0]),
    write_s=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_more_notice_never_loses_more(
    at: float, short: float, more: float, interval_s: float, write_s: float
) -> None:
    """Of one machine's end, which is all that a notice can be compared on: what follows shifts in time."""
    costs = EXACT.model_copy(update={"write_s": write_s})
    plan = stage(steps=400, blocks=2, workers=(1, 2), interval_s=interval_s, costs=costs)
    trace = machines([(0, "up", 0), (0, "up", 1), (at, "down", 1)], 2)

    def lost(notice_s: float) -> float:
        return account(predict([plan], trace.with_notice(notice_s)))["seconds_lost"]

    assert lost(short + more) <= lost(short) + 1e-9


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(storms(), st.integers(1, 6))
def test_no_work_that_was_announced_in_time_is_lost(trace: Trace, blocks: int) -> None:
    """A notice longer than a start, two steps and two saves loses nothing, whatever else happens meanwhile."""
    trace = trace.with_notice(0)
    plan = stage(steps=500, blocks=blocks, workers=(1, 6))
    # machines that are there for less than that cannot announce anything in time
    long = [e for e in trace.events if e.kind != "notice"]
    up: dict[int, float] = {}
    brief = set()
    for event in long:
        if event.kind == "up":
            up[event.machine] = event.at
        elif event.at - up[event.machine] < 60:
            brief.add(event.machine)
    kept = tuple(event for event in long if event.machine not in brief)
    found = predict([plan], replace(trace, events=kept).with_notice(60))
    assert account(found)["seconds_lost"] == 0
    assert account(found)["preemptions"] == 0


def test_a_group_that_is_lost_before_its_first_checkpoint_has_stepped() -> None:
    # Its last step is under way when a machine goes; the other one's slot goes on at once, without waiting for the
    # machine that is back soon, as before a job's first step.
    trace = machines([(0, "up", 0), (0, "up", 1), (17.25, "down", 1), (17.5, "up", 1)], 2)
    found = predict([stage(steps=6, blocks=2, workers=(1, 2), interval_s=1e9)], trace)
    assert seconds(found)["restart"] == 2.0 + 1.0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(storms((100.0, 500.0)), stages())
def test_asking_all_the_time_decides_nothing_else(trace: Trace, plan: SimulatedStage) -> None:
    """The simulator asks the rules only when their answer can change; asking four times a second says the same.

    It is what keeps `scaling_rules.holds_for_s` true to `decide`, and the simulator to both.
    """
    plan = replace(plan, jobs=plan.jobs[:1])

    class Impatient(job_module.SimulatedJob):
        def next_time(self) -> float:
            return min(super().next_time(), self.now + 0.25)

        def advance(self, to: float) -> bool:
            super().advance(to)
            return True

    found = predict([plan], trace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.simulation.prediction.SimulatedJob", Impatient)
        impatient = predict([plan], trace)
    assert impatient.finished == found.finished
    assert account(impatient)["resizes"] == account(found)["resizes"]
    assert impatient.seconds == pytest.approx(found.seconds, abs=1e-3)


# --- a plain reference ------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    losses=st.lists(st.floats(15, 300), max_size=4, unique=True).map(sorted),
    interval_s=st.sampled_from([3.0, 10.0, 40.0]),
    write_s=st.sampled_from([0.3, 1.0, 6.0]),
)
def test_jumping_over_steps_is_the_same_as_taking_them(
    losses: list[float], interval_s: float, write_s: float
) -> None:
    """One worker whose machine goes and is back at once, against a loop that takes every single step."""
    costs = EXACT.model_copy(update={"write_s": write_s, "warm_s": 0.0})
    events = [(0.0, "up", 0)]
    for at in losses:
        events += [(at, "down", 0), (at, "up", 0)]
    plan = stage(steps=200, blocks=1, workers=(1, 1), interval_s=interval_s, costs=costs)
    found = predict([plan], machines(events, 1))
    useful, lost, end = stepwise(200, losses, interval_s, costs)
    assert found.seconds == pytest.approx(end, abs=1e-6)
    assert seconds(found)["useful"] == pytest.approx(useful, abs=1e-6)
    assert seconds(found)["lost"] == pytest.approx(lost, abs=1e-6)


def stepwise(
    steps: int, losses: list[float], interval_s: float, costs: StageCosts
) -> tuple[float, float, float]:
    """Useful seconds, lost seconds and the end, in the words of `training/loop.py`, one step at a time."""
    now, safe, pending = costs.overhead_s, (0, 0.0), list(losses)
    useful = lost = 0.0
    while pending and pending[0] <= now:
        pending.pop(0)
    while True:
        death = pending[0] if pending else math.inf
        now += costs.start_s + (costs.restore_s if safe[0] else 0.0)
        step, computed, saved_at, writing = safe[0], 0.0, now, None
        safe = (step, 0.0)
        died = now > death
        first = True
        while not died:
            took = costs.step_s + costs.block_s + (costs.first_step_s if first else 0.0)
            first = False
            if now + took > death:
                computed += max(0.0, death - now)
                died = True
                break
            now, computed, step = now + took, computed + took, step + 1
            was_writing = writing is not None
            if writing is not None and writing[0] <= now + 1e-9:
                safe, writing = writing[1], None
            if step == steps:
                wait = max(0.0, writing[0] - now) if writing else 0.0
                now += wait + costs.stall_s + costs.write_s
                if now > death:
                    if writing is not None and writing[0] <= death:
                        safe = writing[1]
                    died = True
                    break
                return useful + computed, lost, now
            if not was_writing and now - saved_at >= interval_s - 1e-9:
                now += costs.stall_s
                if now > death:
                    died = True
                    break
                saved_at, writing = now, (now + costs.write_s, (step, computed))
        useful, lost = useful + safe[1], lost + computed - safe[1]
        pending.pop(0)
        now = death + costs.detect_s
        while pending and pending[0] <= now:
            pending.pop(0)
