"""A trace replayed on raylets that come, announce their end and are killed goes as the simulator predicts."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bench._measure import Measured, from_mlflow, stage_costs
from bench._paced import PIPELINE, Paced
from bench._replay import Replayed, replay
from bench.harness import Arm, Claim, summarize
from orchestrator.pipeline.dag import order
from orchestrator.pipeline.load import load
from orchestrator.simulation.costs import Costs
from orchestrator.simulation.prediction import JobResult, plan_stages, predict
from orchestrator.simulation.trace import Machine, Trace, TraceEvent, in_order
from tools.market import SpotMarket
from tools.synthetic import synthetic

GOAL = 0.15
MACHINES = 4
# Two hours of a market in which a machine lasts an hour, in four minutes.
COMPRESSION = 30.0
_TIMEOUT_S = 1200.0
_STAGE = "train"
_CALIBRATION_STEPS = 220


@dataclass(frozen=True)
class Case:
    """One replay: what was predicted first, and what came out."""

    predicted: JobResult
    measured: Measured
    replayed: Replayed

    @property
    def errors(self) -> dict[str, float]:
        """How far the prediction was off: the finish time relatively, goodput in points."""
        seconds = self.measured.metrics["seconds_total"]
        return {
            "seconds": abs(self.predicted.account.total - seconds) / seconds,
            "goodput": abs(self.predicted.metrics()["goodput"] - self.measured.metrics["goodput"]),
        }


def run(quick: bool) -> Claim:
    """Measure the costs in one disturbed run, then predict and replay other traces on the same raylets."""
    steps = 400 if quick else 600
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    seeds = (1,) if quick else (1, 2, 3)
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-replay-"))
    try:
        with SpotMarket() as market:
            costs = _calibrated(market, folder / "calibration", _CALIBRATION_STEPS)
            cases = [_case(market, folder / f"trace-{seed}", steps, _trace(seed), costs) for seed in seeds]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _claim(cases, costs)


def _calibrated(market: SpotMarket, folder: Path, steps: int) -> Costs:
    """Costs from a run that sees each kind of event, and each number of workers, once or twice."""
    machines = tuple(Machine(f"m{i}", "raylet", 1, ((0.0, 1.0),)) for i in range(MACHINES))
    events = [TraceEvent(0.0, "up", i) for i in range(MACHINES)]
    events += [TraceEvent(50.0, "down", 3), TraceEvent(70.0, "notice", 2, 85.0), TraceEvent(85.0, "down", 2)]
    # All gone: the next one to come is waited for, and tells how long its slot takes to be ready.
    events += [
        TraceEvent(95.0, "down", 1),
        TraceEvent(105.0, "down", 0),
        TraceEvent(112.0, "up", 0),
        TraceEvent(140.0, "up", 1),
    ]
    done = _replayed(market, Trace("calibration", "", machines, in_order(events)), folder, steps)
    run = from_mlflow(_tracking(folder), _STAGE)
    losses = [event.at for event in done.played if event.kind == "down"]
    arrivals = [event.at for event in done.played if event.kind == "up"]
    section = stage_costs(run, _recoveries(folder), began=done.began, losses=losses, arrivals=arrivals)
    return Costs(source="calibration", stages={_STAGE: section})


def _trace(seed: int) -> Trace:
    hour = 3600.0
    whole = synthetic(
        "m",
        count=MACHINES,
        duration_s=8 * hour,
        mean_up_s=hour,
        mean_down_s=0.25 * hour,
        notice_s=20 * COMPRESSION,
        notice_share=0.5,
        seed=seed,
    )
    trace = compressed(whole, COMPRESSION)
    machines = tuple(replace(machine, name=f"m{i}") for i, machine in enumerate(trace.machines))
    return replace(trace, machines=machines)


def compressed(trace: Trace, factor: float) -> Trace:
    """A trace with time running `factor` times as fast; an hour's price buys `factor` times less."""
    events = tuple(
        replace(event, at=event.at / factor, deadline_at=event.deadline_at / factor) for event in trace.events
    )
    machines = tuple(
        replace(machine, prices=tuple((since / factor, price * factor) for since, price in machine.prices))
        for machine in trace.machines
    )
    return replace(trace, machines=machines, events=events, duration_s=trace.duration_s / factor)


def _case(market: SpotMarket, folder: Path, steps: int, trace: Trace, costs: Costs) -> Case:
    loaded = load(PIPELINE, [f"stages.train.steps={steps}"], stage_type=Paced)
    # Only what is measured is predicted: the first stage has warmed the slots of the machines of second 0.
    costs = costs.override(["overhead_s=0"], [_STAGE])
    (stage,) = [plan for plan in plan_stages(loaded.spec, order(loaded), costs) if plan.name == _STAGE]
    prediction = predict([stage], trace, warm=True)
    if not prediction.finished:
        raise RuntimeError(f"the trace is too short for the replay: {prediction.why_not}")
    replayed = _replayed(market, trace, folder, steps)
    (job,) = prediction.stages[0].jobs
    return Case(job, from_mlflow(_tracking(folder), _STAGE), replayed)


def _replayed(market: SpotMarket, trace: Trace, folder: Path, steps: int) -> Replayed:
    folder.mkdir()
    shutil.copy(PIPELINE, folder / "pipeline.yaml")
    overrides = [f"stages.train.steps={steps}", f"cluster.address={market.address}"]
    command = [sys.executable, "-m", "bench._paced", "run", "pipeline.yaml", *overrides]
    done = replay(
        market,
        trace,
        command,
        stage=_STAGE,
        folder=folder,
        environment=os.environ,
        timeout_s=_TIMEOUT_S,
    )
    if done.code:
        raise RuntimeError(f"the run failed with {done.code}:\n{done.output}")
    return done


def _recoveries(folder: Path) -> list[dict[str, object]]:
    accounts = [json.loads(path.read_text()) for path in folder.glob("runs/artifacts/*/goodput.json")]
    (account,) = [account for account in accounts if account["stage"] == _STAGE]
    found: list[dict[str, object]] = account["recoveries"]
    return found


def _tracking(folder: Path) -> str:
    return f"sqlite:///{folder / 'runs' / 'mlflow.db'}"


def _claim(cases: list[Case], costs: Costs) -> Claim:
    arms: dict[str, Arm] = {}
    notes = [f"costs: {json.dumps(costs.stages[_STAGE])}"]
    for number, case in enumerate(cases, 1):
        ours, real = case.predicted.metrics(), case.measured.metrics
        arms[f"trace {number}: s predicted"] = summarize([ours["seconds_total"]])
        arms[f"trace {number}: s measured"] = summarize([real["seconds_total"]])
        arms[f"trace {number}: goodput predicted"] = summarize([ours["goodput"]])
        arms[f"trace {number}: goodput measured"] = summarize([real["goodput"]])
        late = [event.done_s - event.planned_s for event in case.replayed.played]
        notes.append(f"trace {number}: {len(late)} events, the latest {max(late, default=0.0):.1f} s late")
        notes += [
            f"  {who}: {_causes(figures)}" for who, figures in (("predicted", ours), ("measured", real))
        ]
    return Claim(
        claim="finish time and goodput of a replayed trace are as predicted",
        figure=max(error for case in cases for error in case.errors.values()),
        unit="largest relative error of a finish time, or error of a goodput",
        goal=GOAL,
        limit=0.0,
        arms=arms,
        notes=notes,
    )


def _causes(metrics: Mapping[str, float]) -> str:
    names = ("useful", "startup", "lost", "checkpoint", "waiting", "restart")
    seconds = ", ".join(f"{name} {metrics[f'seconds_{name}']:.1f}" for name in names)
    return f"{seconds}; preemptions {metrics['preemptions']:.0f}, resizes {metrics['resizes']:.0f}"
