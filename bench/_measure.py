"""Costs from what a run left behind: its account (`goodput.json`) and its metrics in MLflow."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.simulation.costs import StageCosts

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """What MLflow has of a stage; times in seconds since 1970.

    Attributes:
        metrics: the newest goodput figures, by name.
        steps: when each step was reported, and its number.
        workers: how many workers there were from when on.
        stalls: seconds that checkpoints held training up.
        writes: seconds until they were written.
    """

    metrics: dict[str, float]
    steps: Series
    workers: Series
    stalls: Sequence[float]
    writes: Sequence[float]


def from_mlflow(tracking_uri: str, stage: str) -> Measured:
    """What MLflow has of a stage's newest run.

    Raises:
        LookupError: there is no run of that name.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    query = f"attributes.run_name = '{stage}'"
    runs = client.search_runs(experiments, query, order_by=["attributes.start_time DESC"], max_results=1)
    if not runs:
        raise LookupError(f"{tracking_uri} has no run {stage!r}")
    run = runs[0]

    def history(name: str) -> list[Any]:
        found = client.get_metric_history(run.info.run_id, name)
        return sorted(found, key=lambda metric: (metric.timestamp, metric.step))

    prefix = "goodput/"
    newest = run.data.metrics.items()
    return Measured(
        metrics={name.removeprefix(prefix): value for name, value in newest if name.startswith(prefix)},
        steps=[(metric.timestamp / 1000, metric.step) for metric in history("train/loss")],
        workers=[(metric.timestamp / 1000, metric.value) for metric in history("goodput/workers")],
        stalls=[metric.value for metric in history("checkpoint/stall_seconds")],
        writes=[metric.value for metric in history("checkpoint/write_seconds")],
    )


def stage_costs(
    run: Measured,
    recoveries: Sequence[dict[str, Any]],
    *,
    began: float,
    losses: Sequence[float] = (),
    arrivals: Sequence[float] = (),
) -> dict[str, Any]:
    """A stage's section of a costs file.

    Args:
        run: what MLflow has.
        recoveries: of the account, as JSON.
        began: when the stage started.
        losses: when machines were killed, as far as that is known; without it `detect_s` is left out.
        arrivals: when machines came. A group that waited for one tells what its slot took to be ready; without
            such a group that is told by the stage's start, when all slots start at once.
    """
    steps = _step_seconds(run, recoveries)
    found: dict[str, list[float]] = {"stall_s": list(run.stalls), "write_s": list(run.writes)}
    for recovery in recoveries:
        marks = recovery["marks"]
        if not {"built", "restored"} <= marks.keys():
            continue
        found.setdefault("start_s", []).append(marks["built"] - recovery["decided"])
        found.setdefault("restore_s", []).append(marks["restored"] - marks["built"])
        if usual := steps.get(recovery["workers"]):
            longer = recovery["first_step"] - marks["restored"] - statistics.fmean(usual)
            found.setdefault("first_step_s", []).append(max(0.0, longer))
        before = [at for at in losses if at <= recovery["detected"]]
        if not recovery["planned"] and before:
            found.setdefault("detect_s", []).append(recovery["detected"] - before[-1])
        awaited = [at for at in arrivals if recovery["detected"] < at < recovery["decided"]]
        if awaited:
            found.setdefault("warm_s", []).append(recovery["decided"] - awaited[0])
    if run.steps and "warm_s" not in found:
        until_step = run.steps[0][0] - began
        start = _median(found.get("start_s", [])) + _median(found.get("first_step_s", []))
        first = statistics.fmean(next(iter(steps.values()))) if steps else 0.0
        found["warm_s"] = [max(0.0, until_step - start - first)]
    return section_of(steps, found)


def _step_seconds(run: Measured, recoveries: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    """Seconds between steps by number of workers, without those in which a group began or ended."""
    marks = [at for at, _ in run.workers]
    breaks = sorted(at for recovery in recoveries for at in (recovery["detected"], recovery["first_step"]))
    seconds: dict[int, list[float]] = {}
    for (before, step), (after, following) in zip(run.steps, run.steps[1:], strict=False):
        index = bisect.bisect_right(marks, after)
        around = {int(number) for _, number in run.workers[max(0, index - 1) : index + 1]}
        broken = bisect.bisect_right(breaks, after) != bisect.bisect_left(breaks, before)
        if following == step + 1 and len(around) == 1 and not broken and (workers := around.pop()) > 0:
            seconds.setdefault(workers, []).append(after - before)
    return seconds


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0


def section_of(
    step_s: Mapping[int, Sequence[float]], others: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """One stage's section of a costs file from what a run measured.

    A step is its mean, as a stage's time is the sum of its steps. A median would be wrong: a step is seen when the
    controller polls, so that the times between two steps are whole polls, and their median is one poll or two. The
    other costs are few, and medians.

    Args:
        step_s: seconds of steps by number of workers, without groups' first ones.
        others: what was measured of the other costs, by their name in `StageCosts`; those without are left out.
    """
    section: dict[str, Any] = {name: statistics.median(values) for name, values in others.items() if values}
    section["measured_step_s"] = {
        count: statistics.fmean(values) for count, values in step_s.items() if values
    }
    return StageCosts.model_validate(section).model_dump(exclude_unset=True)
