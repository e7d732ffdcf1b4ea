"""Small traces and plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from orchestrator.simulation.costs import StageCosts
from orchestrator.simulation.job import JobPlan
from orchestrator.simulation.prediction import SimulatedStage
from orchestrator.simulation.trace import Machine, Trace, TraceEvent, in_order

# Powers of two: sums of them are exact, so tests can compare with ==.
EXACT = StageCosts(
    block_s=0.5,
    step_s=0.25,
    stall_s=0.125,
    write_s=1.0,
    detect_s=2.0,
    start_s=1.0,
    restore_s=0.5,
    first_step_s=0.25,
    warm_s=8.0,
    overhead_s=4.0,
    seconds=16.0,
)


def machines(
    events: Sequence[tuple[float, str, int] | tuple[float, str, int, float]],
    count: int,
    *,
    slots: int = 1,
    price: float = 1.0,
    duration_s: float = math.inf,
) -> Trace:
    """A trace of `count` machines; an event is (second, kind, machine[, deadline])."""
    there = tuple(Machine(f"m{i}", "cpu", slots, ((0.0, price),)) for i in range(count))
    return Trace("test", "", there, in_order(TraceEvent(*event) for event in events), duration_s)  # type: ignore[arg-type]


def steady(count: int, **more: Any) -> Trace:
    """Machines that are there from the start and stay."""
    return machines([(0.0, "up", i) for i in range(count)], count, **more)


def stage(
    steps: int = 100,
    blocks: int = 4,
    workers: tuple[int, int] = (1, 4),
    interval_s: float | None = 10.0,
    costs: StageCosts = EXACT,
    name: str = "pretrain",
) -> SimulatedStage:
    """A stage with one job."""
    return SimulatedStage(
        name, "pretrain", (JobPlan(name, steps, blocks, workers, interval_s, costs),), costs
    )
