"""A prediction as tables for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.simulation.prediction import CAUSES, JobResult, Prediction
from orchestrator.table import Rows
from orchestrator.units import duration

_HEADINGS = {
    "useful": "useful",
    "startup": "start-up",
    "lost": "lost steps",
    "checkpoint": "checkpoint",
    "waiting": "waiting",
    "restart": "restart",
}


@dataclass(frozen=True)
class Report:
    """All that one call of `orchestrator simulate` found.

    Attributes:
        trace: its name and zone.
        source: where the costs come from.
        main: the prediction.
        on_demand: the same on machines that never go, if their price is known.
        intervals: what other times between checkpoints would do.
    """

    trace: str
    source: str
    main: Prediction
    on_demand: Prediction | None = None
    intervals: Mapping[str, Prediction] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        main = self.main
        return {
            "trace": self.trace,
            "costs": self.source,
            **_summary(main),
            "goodput": main.total().metrics()["goodput"],
            "stages": [
                {
                    "name": stage.name,
                    "kind": stage.kind,
                    "began": stage.began,
                    "ended": stage.ended,
                    "jobs": [_job(job) for job in stage.jobs],
                }
                for stage in main.stages
            ],
            "total": _job(main.total()),
            "on_demand": _summary(self.on_demand) if self.on_demand else None,
            "intervals": {
                name: _summary(prediction) | prediction.total().metrics()
                for name, prediction in self.intervals.items()
            },
        }

    def print(self, console: Console) -> None:
        """The tables."""
        console.print(Text(f"Simulated on {self.trace}", style="bold"))
        _stages(self.main).print(console)
        self._print_end(console)
        if self.intervals:
            _intervals(self.intervals).print(console)
        if self.source == "defaults":
            hint = "the costs are default estimates; give your model's with --costs or --cost block_s=…"
            console.print(f"  {hint}", style="bright_black", soft_wrap=True)

    def _print_end(self, console: Console) -> None:
        main, other = self.main, self.on_demand
        if main.finished:
            console.print(f"[green]✓[/] finishes after [bold]{duration(main.seconds)}[/]", highlight=False)
        else:
            total = main.total()
            done = f"{total.steps} of {total.num_steps} steps of the stages so far"
            line = f"[red]✗[/] never finishes: {main.why_not} after {duration(main.seconds)}, {done} are done"
            console.print(line, highlight=False, soft_wrap=True)
        # Traces and options give prices without a currency.
        cost = f"  costs [bold]{main.cost:,.2f}[/], in the currency of the prices, "
        cost += f"for {main.machine_hours:,.1f} machine hours"
        if other is not None:
            cost += f"; on demand {other.cost:,.2f} and {duration(other.seconds)}"
            if main.finished and other.cost:
                cost += f" ({main.cost / other.cost:.0%} of the price, {main.seconds / other.seconds:.2f}× the time)"
        console.print(cost, highlight=False, soft_wrap=True)


def _stages(prediction: Prediction) -> Rows:
    causes, counts = list(_HEADINGS.values()), ["preempted", "announced", "resized"]
    # In a narrow terminal the rare causes go first.
    expendable = [*reversed(counts), *reversed(causes)]
    table = Rows(("stage", "steps", "ends after", "goodput", *causes, *counts), expendable)
    for stage in prediction.stages:
        if not stage.jobs:
            ended = duration(stage.ended) if stage.ended is not None else "–"
            cells = [stage.name, "", ended, *[""] * (len(table.columns) - 3)]
            table.add(*(Text(cell, style="bright_black") for cell in cells))
        for job in stage.jobs:
            table.add(*_row(job))
    table.add(*(Text(cell, style="bold") for cell in _row(prediction.total())))
    return table


def _row(job: JobResult) -> list[str]:
    metrics = job.metrics()
    steps = f"{job.steps}" if job.steps == job.num_steps else f"{job.steps}/{job.num_steps}"
    ended = duration(job.ended) if job.ended is not None else "–"
    seconds = [duration(metrics[f"seconds_{cause}"]) for cause in CAUSES]
    counts = [f"{metrics[name]:.0f}" for name in ("preemptions", "preemptions_announced", "resizes")]
    return [job.name, steps, ended, f"{metrics['goodput']:.1%}", *seconds, *counts]


def _intervals(intervals: Mapping[str, Prediction]) -> Rows:
    headings = (
        "time between checkpoints",
        "ends after",
        "goodput",
        "lost steps",
        "checkpoint",
        "checkpoints",
        "cost",
    )
    table = Rows(headings, expendable=("checkpoints", "checkpoint", "lost steps"))
    for name, prediction in intervals.items():
        metrics = prediction.total().metrics()
        table.add(
            name if name == "auto" else f"{name} s",
            duration(prediction.seconds) if prediction.finished else "–",
            f"{metrics['goodput']:.2%}",
            duration(metrics["seconds_lost"]),
            duration(metrics["seconds_checkpoint"]),
            f"{metrics['checkpoints']:.0f}",
            f"{prediction.cost:,.2f}",
        )
    return table


def _summary(prediction: Prediction) -> dict[str, Any]:
    return {
        "finished": prediction.finished,
        "why_not": prediction.why_not,
        "seconds": prediction.seconds,
        "cost": prediction.cost,
        "machine_hours": prediction.machine_hours,
    }


def _job(job: JobResult) -> dict[str, Any]:
    return {
        "name": job.name,
        "steps": job.steps,
        "num_steps": job.num_steps,
        "ended": job.ended,
        **job.metrics(),
    }
