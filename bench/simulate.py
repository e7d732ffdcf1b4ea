"""A week of a thousand machines that come and go is simulated in seconds."""

from __future__ import annotations

from bench.harness import Claim, interleave, timed
from orchestrator.simulation.costs import StageCosts
from orchestrator.simulation.job import JobPlan
from orchestrator.simulation.prediction import Prediction, SimulatedStage, predict
from tools.synthetic import synthetic

_DAY_S = 86_400.0
GOAL_S = 60.0


def run(quick: bool) -> Claim:
    """Simulate one job on as many workers as there are machines, each of which goes once a day."""
    sizes = (10, 100) if quick else (10, 100, 1000)
    days, repetitions = (1, 3) if quick else (7, 5)
    traces = {
        size: synthetic(
            "bench",
            count=size,
            duration_s=days * _DAY_S,
            mean_up_s=_DAY_S,
            mean_down_s=3600.0,
            notice_share=0.5,
            seed=0,
        )
        for size in sizes
    }
    found: dict[int, Prediction] = {}

    def simulate(size: int) -> None:
        found[size] = predict([_stage(size)], traces[size])

    work = {f"{size} machines": timed(lambda size=size: simulate(size)) for size in sizes}  # type: ignore[misc]
    arms = interleave(work, repetitions)
    largest = max(sizes)
    notes = [
        f"{size} machines, {days} days: {len(traces[size].events)} events, "
        f"{prediction.total().account.restarts + prediction.total().account.resizes} regroupings, "
        f"{prediction.total().account.checkpoints} checkpoints, goodput {prediction.total().metrics()['goodput']:.3f}"
        for size, prediction in found.items()
    ]
    return Claim(
        claim=f"{days} days of {largest} machines are simulated in seconds",
        figure=arms[f"{largest} machines"].median,
        unit="s",
        goal=GOAL_S,
        limit=None,
        arms=arms,
        notes=notes,
    )


def _stage(size: int) -> SimulatedStage:
    """A job that does not end within the trace, with the engine's own time between checkpoints."""
    costs = StageCosts()
    job = JobPlan("bench", 10_000_000, size, (1, size), None, costs)
    return SimulatedStage("bench", "pretrain", (job,), costs)
