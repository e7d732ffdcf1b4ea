"""`plan`: stages, costs, the split of devices, schedules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import AcceptCode, File, First, Force, Last, Only, Overrides, RerunOn, choice_of
from orchestrator.cli.terminal import console
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.pipeline.load import LoadedPipeline
    from orchestrator.pipeline.plan.stage_plan import Choice


def plan(
    file: File,
    overrides: Overrides = None,
    schedules: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Only draw the pipeline's schedules, into this PNG file."),
    ] = None,
    devices: Annotated[
        float | None,
        typer.Option(
            help="Only show the best split of this number of devices between teacher and students.", min=0.01
        ),
    ] = None,
    refresh: Annotated[
        bool,
        typer.Option("--refresh", help="With --devices, ignore earlier measurements and measure again."),
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print only the costs (with --devices: only the split) as JSON."),
    ] = False,
    only: Only = None,
    first: First = None,
    last: Last = None,
    force: Force = None,
    rerun_on: RerunOn = None,
    accept_code: AcceptCode = False,
) -> None:
    """Show which stages would run and why, and every problem that would stop the run. Changes nothing.

    If the file has a `hardware` section, the estimated cost is shown too.
    """
    from orchestrator.pipeline.load import load

    shows_stages = devices is None and schedules is None and not as_json
    loaded = load(file, overrides or [], needs_data=False, gather=shows_stages)
    if devices is not None:
        _print_splits(loaded, devices, refresh=refresh, as_json=as_json)
    elif schedules is not None:
        _draw_schedules(loaded, schedules)
    elif as_json:
        _print_costs(loaded, as_json=True)
    else:
        _print_stages(loaded, choice_of(only, first, last, force, rerun_on, accept_code=accept_code))
        if loaded.spec.hardware is not None:
            _print_costs(loaded, as_json=False)


def _print_stages(loaded: LoadedPipeline, choice: Choice) -> None:
    from orchestrator.pipeline.check.pipeline_check import check
    from orchestrator.pipeline.console import print_findings, print_plan, print_stages
    from orchestrator.pipeline.plan.stage_plan import plan_of

    found = check(loaded, runs=False, choice=choice)
    if found.errors:
        print_findings(console(), found)
        found.raise_if_any()
    if loaded.missing:
        # Keys depend on the data's content, so nobody can say what is cached.
        print_stages(console(), loaded)
        print_findings(console(), found)
        return
    print_plan(console(), loaded, plan_of(loaded, found.stages, choice))
    print_findings(console(), found)


def _print_costs(loaded: LoadedPipeline, *, as_json: bool) -> None:
    import json

    from orchestrator.pipeline.cost.cost_table import as_dict, print_costs
    from orchestrator.pipeline.cost.costing import costings

    hardware = loaded.spec.hardware
    if hardware is None:
        raise UserError(
            "the pipeline has no `hardware` section, so its cost cannot be estimated",
            where=str(loaded.path),
            hint="add one, such as `hardware: {devices: 256, name: H100 SXM, mfu: 0.4}`",
        )
    found = list(costings(loaded, hardware))
    if as_json:
        typer.echo(json.dumps(as_dict(hardware, found), indent=1))
    else:
        print_costs(console(), hardware, found)


def _print_splits(loaded: LoadedPipeline, devices: float, *, refresh: bool, as_json: bool) -> None:
    import json

    from orchestrator.pipeline.cost.device_split import as_dict, print_splits, splits

    notes = console(stderr=True)
    with notes.status("estimating costs") as status:

        def say(line: str) -> None:
            status.update(line)
            if not notes.is_terminal:  # where a status shows nothing
                notes.print(line, highlight=False, soft_wrap=True, markup=False)

        found = splits(loaded, devices, refresh=refresh, say=say)
    if as_json:
        typer.echo(json.dumps(as_dict(found), indent=1))
    else:
        print_splits(console(), found)


def _draw_schedules(loaded: LoadedPipeline, picture: Path) -> None:
    from orchestrator.pipeline.plan.schedule_chart import draw

    number = draw(loaded, picture)
    console().print(
        f"[green]✓[/] Drew {number} schedules into [bold]{picture}[/]", highlight=False, soft_wrap=True
    )
