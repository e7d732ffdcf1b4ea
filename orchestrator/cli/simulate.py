"""`simulate`: a pipeline on a trace of machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Overrides
from orchestrator.cli.terminal import console


def simulate(
    trace: Annotated[
        Path,
        typer.Argument(
            metavar="TRACE.json",
            help="The trace: which machines were available when (see docs/traces.md).",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    pipeline: Annotated[
        Path, typer.Option("--pipeline", "-p", metavar="FILE", help="The pipeline file.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    costs: Annotated[
        Path | None,
        typer.Option(
            help="A file with the seconds that each operation takes, from a measured run (see docs/traces.md)."
        ),
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=SECONDS",
            help="One cost, such as [bold]block_s=0.8[/]; overrides the costs file. Can be repeated.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(help="Hourly price per machine, in any currency; overrides the trace.", min=0),
    ] = None,
    on_demand_price: Annotated[
        float | None,
        typer.Option(
            help="Hourly price per on-demand machine. If given, the same run on on-demand machines is compared.",
            min=0,
        ),
    ] = None,
    notice: Annotated[
        float,
        typer.Option(
            help="Seconds of notice before each preemption that the trace does not announce.", min=0
        ),
    ] = 0.0,
    start: Annotated[
        float, typer.Option(help="Seconds into the trace at which the simulation starts.", min=0)
    ] = 0.0,
    interval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECONDS|auto",
            help="A time between checkpoints to compare with the pipeline's. Can be repeated.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict finish time, goodput and cost on a trace of spot machines. Runs nothing."""
    import json

    from orchestrator.pipeline.dag import order
    from orchestrator.pipeline.load import load
    from orchestrator.simulation.options import SimulateOptions
    from orchestrator.simulation.options import simulate as predict

    loaded = load(pipeline, overrides or [], needs_data=False)
    options = SimulateOptions(trace, costs, cost or (), price, on_demand_price, notice, start, interval or ())
    report = predict(loaded.spec, order(loaded), options)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        report.print(console())
