"""A whole pipeline on a trace: when each stage ends, where the time goes, what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Pipeline
from orchestrator.errors import UserError
from orchestrator.simulation.costs import Costs, StageCosts
from orchestrator.simulation.job import JobPlan, SimulatedJob, SimulatedTime
from orchestrator.simulation.machines import Machines
from orchestrator.simulation.trace import Trace, always
from orchestrator.stages.base import Stage, TrainStage

CAUSES = ("useful", "startup", "lost", "checkpoint", "waiting", "restart")
COUNTS = (
    "preemptions",
    "preemptions_announced",
    "resizes",
    "restarts",
    "steps_lost",
    "checkpoints",
)


_RECORD_ENDS = "the trace ends"


@dataclass(frozen=True)
class SimulatedStage:
    """What a stage has to do; one without jobs takes its costs' `seconds`, on the machine of the driver."""

    name: str
    kind: str
    jobs: tuple[JobPlan, ...]
    costs: StageCosts


@dataclass(frozen=True)
class JobResult:
    """How a job went; `steps` done of `num_steps`."""

    name: str
    steps: int
    num_steps: int
    ended: float | None
    account: SimulatedTime

    def metrics(self) -> dict[str, float]:
        """The names under which the engine tracks them."""
        account = self.account
        seconds = {f"seconds_{cause}": getattr(account, cause) for cause in CAUSES}
        counts = {name: float(getattr(account, name)) for name in COUNTS}
        goodput = account.useful / account.total if account.total else 0.0
        return {"goodput": goodput, "seconds_total": account.total, **seconds, **counts}


@dataclass(frozen=True)
class StageResult:
    """How a stage went; `ended` is None if it did not."""

    name: str
    kind: str
    began: float
    ended: float | None
    jobs: tuple[JobResult, ...]


@dataclass(frozen=True)
class Prediction:
    """How the pipeline went. `why_not` says what stopped it if it did not finish; then `seconds` is until there."""

    seconds: float
    finished: bool
    why_not: str
    cost: float
    machine_hours: float
    stages: tuple[StageResult, ...]

    def total(self) -> JobResult:
        """All jobs as if they were one."""
        jobs = [job for stage in self.stages for job in stage.jobs]
        sums = SimulatedTime()
        for name in (*CAUSES, *COUNTS, "worker_s"):
            setattr(sums, name, sum(getattr(job.account, name) for job in jobs))
        steps, num_steps = sum(job.steps for job in jobs), sum(job.num_steps for job in jobs)
        return JobResult("total", steps, num_steps, self.seconds if self.finished else None, sums)


def plan_stages(
    spec: Pipeline[Stage], order: Sequence[str], costs: Costs, interval_s: float | str | None = None
) -> list[SimulatedStage]:
    """What the stages have to do, in this order.

    Args:
        interval_s: seconds between checkpoints in place of the pipeline's; `auto` lets the engine choose.

    Raises:
        UserError: no stage trains.
    """
    plans = []
    for name in order:
        stage = spec.stages[name]
        jobs: tuple[JobPlan, ...] = ()
        if isinstance(stage, TrainStage):
            elastic = spec.elastic.overlaid(stage.elastic)
            students: Mapping[str, Any] = getattr(stage, "students", {})
            names = [f"{name}/{student}" for student in students] or [name]
            jobs = tuple(_job_plan(job, stage, elastic, costs.of(job), interval_s) for job in names)
        plans.append(SimulatedStage(name, stage.kind, jobs, costs.of(name)))
    if not any(plan.jobs for plan in plans):
        raise UserError(
            f"no stage of the pipeline {spec.name!r} trains, so there is nothing to simulate",
            hint=f"its stages are {', '.join(order) or 'none'}; add one such as pretrain",
        )
    return plans


def predict(plans: Sequence[SimulatedStage], trace: Trace, *, warm: bool = False) -> Prediction:
    """Let the stages run one after the other on the machines of `trace`, from its second 0.

    Args:
        warm: the first stage finds ready slots on the machines that are there, as if another one had just ended.
    """
    machines = Machines(trace, warm=warm)
    now, why_not = 0.0, ""
    results: list[StageResult] = []
    for plan in plans:
        began = now
        now += plan.costs.overhead_s + (0.0 if plan.jobs else plan.costs.seconds)
        if now > trace.duration_s:
            why_not, now = _RECORD_ENDS, trace.duration_s
        machines.advance(now)
        jobs: list[SimulatedJob] = []
        if not why_not and plan.jobs:
            jobs = [SimulatedJob(job, machines, now) for job in plan.jobs]
            now, why_not = _train(jobs, machines, now, trace.duration_s)
        done = tuple(
            JobResult(job.plan.name, job.step, job.plan.num_steps, job.now if job.done else None, job.account)
            for job in jobs
        )
        results.append(StageResult(plan.name, plan.kind, began, None if why_not else now, done))
        if why_not:
            break
    cost, hours = machines.bill(now)
    return Prediction(now, not why_not, why_not, cost, hours, tuple(results))


def on_demand(plans: Sequence[SimulatedStage], trace: Trace, price: float) -> Prediction:
    """The same stages on machines at `price` an hour that never go, as many as the widest stage uses."""
    slots = max(machine.slots for machine in trace.machines) if trace.machines else 1
    widest = max(sum(job.workers[1] for job in plan.jobs) for plan in plans)
    return predict(plans, always(-(-widest // slots), slots, price))


def _train(jobs: list[SimulatedJob], machines: Machines, now: float, end: float) -> tuple[float, str]:
    """Run the jobs beside each other from `now`; returns when they ended, and what kept them from it."""
    running = list(jobs)
    _decide(running, machines)
    why_not = ""
    while running and not why_not:
        now = min(machines.next_time(), *(job.next_time() for job in running))
        if math.isinf(now) or now > end:
            why_not = _RECORD_ENDS if math.isfinite(end) else "no more machines become available"
            now = end if math.isfinite(end) else machines.now
        ask = machines.next_time() <= now
        for job in running:
            ask = job.advance(now) or ask  # in this order: each job's time goes on
        if ask:
            lost = machines.advance(now)
            for job in running:
                job.slots_lost(lost)
            running = [job for job in running if not job.done]
            _decide(running, machines)
    for job in running:
        job.stop()
    return now, why_not


def _decide(jobs: list[SimulatedJob], machines: Machines) -> None:
    reclaimed = machines.pool.num_reclaimed
    for job in jobs:
        job.decide()
    if machines.pool.num_reclaimed > reclaimed:
        # Jobs that decided before one of the others reclaimed their slots have to decide again.
        for job in jobs:
            job.decide()


def _job_plan(
    name: str, stage: TrainStage, elastic: Elastic, costs: StageCosts, interval_s: float | str | None
) -> JobPlan:
    # Every stage that trains says its steps like that; which one it is does not matter here.
    num_steps, batch, block = (int(getattr(stage, key)) for key in ("steps", "batch_size", "block_size"))
    every: float | None = elastic.checkpoint_every_s
    if interval_s is not None:
        every = float(interval_s) if interval_s != "auto" else None
    min_workers, max_workers = elastic.workers
    return JobPlan(
        name,
        num_steps,
        batch // block,
        # `workers: auto` is every machine that the trace has, but no more than a step has blocks.
        (min_workers, max(min_workers, batch // block) if elastic.every_device else max_workers),
        every,
        costs,
        elastic.resize_share,
    )


def try_intervals(
    spec: Pipeline[Stage], order: Sequence[str], costs: Costs, trace: Trace, intervals: Sequence[str]
) -> dict[str, Prediction]:
    """What would be at these seconds between checkpoints, or `auto`.

    Raises:
        UserError: one is neither.
    """
    found = {}
    for text in intervals:
        if text != "auto":
            try:
                valid = 0 < float(text) < math.inf
            except ValueError:
                valid = False
            if not valid:
                raise UserError(
                    f"{text!r} is not a time between checkpoints",
                    where=f"command line `--interval {text}`",
                    hint="give seconds, or auto",
                )
        found[text] = predict(plan_stages(spec, order, costs, text), trace)
    return found
