"""The command line. Nothing heavy is imported until a command needs it: `--help` answers at once."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from orchestrator import __version__
from orchestrator.command import command as called
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.pipeline.load import LoadedPipeline
    from orchestrator.pipeline.plan import Choice, ResolvedStage

# What a run takes begins here: reading the file and looking at the data belong to it.
_BEGAN = time.monotonic()

app = typer.Typer(
    name="orchestrator",
    help="Train and distil vision foundation models, with the whole recipe in one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The pipeline file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that override the file, such as [bold]stages.pretrain.steps=200[/].",
        show_default=False,
    ),
]


Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="STAGE", help="Select only this stage. Can be repeated."),
]
First = Annotated[
    str | None,
    typer.Option("--from", metavar="STAGE", help="Select this stage and all stages that depend on it."),
]
Last = Annotated[
    str | None,
    typer.Option("--until", metavar="STAGE", help="Select this stage and all stages that it depends on."),
]
Force = Annotated[
    list[str] | None,
    typer.Option(
        "--force",
        metavar="STAGE",
        help="Run this stage again even if it is up to date, and the selected stages that depend on it. "
        "Can be repeated.",
    ),
]
RerunOn = Annotated[
    Literal["code"] | None,
    typer.Option(
        "--rerun-on",
        help="Also run stages again whose artifacts another version of the code made.",
        show_default=False,
    ),
]
AcceptCode = Annotated[
    bool,
    typer.Option(
        "--accept-code", help="Keep artifacts that another version of the code made. This is the default."
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """The options that come before a command."""


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    only: Only = None,
    first: First = None,
    last: Last = None,
    force: Force = None,
    rerun_on: RerunOn = None,
    accept_code: AcceptCode = False,
) -> None:
    """Run the stages that are not up to date. Ctrl-C stops cleanly; the same command continues.

    Relative paths in the file are relative to the current directory.
    """
    choice = _choice(only, first, last, force, rerun_on, accept_code=accept_code)
    _run(file, overrides or [], must_exist=False, choice=choice)


@app.command()
def resume(file: File, overrides: Overrides = None) -> None:
    """Continue a pipeline that was stopped or failed. Unlike run, it refuses a pipeline that was never started."""
    _run(file, overrides or [], must_exist=True)


@app.command()
def publish(file: File, overrides: Overrides = None) -> None:
    """Update the model registry so that it matches the pipeline file. Runs no other stage."""
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.plan import resolve
    from orchestrator.pipeline.run import publishing

    loaded = load(file, overrides or [])
    stages = resolve(loaded)
    _execute(loaded, stages, "publish", overrides or [], publishing(loaded, stages))


@app.command()
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
        _print_stages(loaded, _choice(only, first, last, force, rerun_on, accept_code=accept_code))
        if loaded.spec.hardware is not None:
            _print_costs(loaded, as_json=False)


@app.command()
def status(file: File, overrides: Overrides = None) -> None:
    """Show each stage's state, attempts, time and latest metrics, and what has not reached MLflow yet."""
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.status import print_status

    print_status(_console(), load(file, overrides or []))


@app.command()
def sync(file: File, overrides: Overrides = None) -> None:
    """Send tracking records to MLflow that it has not received, for example after an outage. Runs no stage.

    The exit code is 0 if everything was sent, and 1 if some records are still waiting.
    """
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.sync import sync as send

    raise typer.Exit(0 if send(_console(), load(file, overrides or [], needs_data=False)) else 1)


@app.command()
def gc(
    file: File,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List artifacts and unfinished work that no pipeline in the store needs. With --yes, delete them.

    Everything that this file would use, or that a ledger in the store refers to, is kept. Nothing is deleted
    while a pipeline of the store is running.
    """
    from orchestrator.pipeline.gc import collect
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.plan import resolve
    from orchestrator.pipeline.workspace import Workspace

    loaded = load(file, overrides or [])
    collect(_console(), Workspace(loaded.spec.store), resolve(loaded), delete=yes)


@app.command()
def logs(
    file: File,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The name of the stage.", show_default=False)],
    overrides: Overrides = None,
    lines: Annotated[
        int, typer.Option("--lines", "-n", help="The number of last lines to print; 0 prints all.", min=0)
    ] = 0,
) -> None:
    """Print a stage's log, with all its attempts."""
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.status import read_log

    for line in read_log(load(file, overrides or []), stage, lines):
        typer.echo(line)


@app.command()
def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME@ALIAS",
            help="The registered model, as NAME@ALIAS or NAME/VERSION.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to create.", show_default=False)],
    tracking: Annotated[
        str,
        typer.Option(help="The address of the MLflow server or database.", envvar="MLFLOW_TRACKING_URI"),
    ] = "sqlite:///runs/mlflow.db",
    store: Annotated[
        str | None,
        typer.Option(
            help="The store that holds the files now, if it was moved after the model was published."
        ),
    ] = None,
) -> None:
    """Download a published model from the registry into a folder."""
    from orchestrator.tracking.registry import pull as fetch

    folder = fetch(model, out, tracking, store)
    _console().print(f"[green]✓[/] {model} is in [bold]{folder}[/]", highlight=False, soft_wrap=True)


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that a pipeline file can use, with parameters and operations at 256 and 512 px."""
    import json

    from orchestrator.pipeline.model_table import model_rows, print_models

    if as_json:
        typer.echo(json.dumps(model_rows(), indent=1))
    else:
        print_models(_console())


@app.command()
def explain(
    key: Annotated[
        str,
        typer.Argument(
            metavar="[KEY]",
            help="A key such as stages.pretrain.mix or lr. Without one, the top level of the file is explained.",
        ),
    ] = "",
) -> None:
    """Explain a key of a pipeline file: its meaning, type, range and default."""
    from orchestrator.pipeline.explain import explain as find
    from orchestrator.pipeline.explain import text

    width = min(_console().width, 100)
    typer.echo("\n\n".join(text(each, width) for each in find(key)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of pipeline files. Editors use it to complete keys and to mark mistakes."""
    from orchestrator.pipeline.json_schema import schema_text

    typer.echo(schema_text(), nl=False)


@app.command()
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
        float | None, typer.Option(help="Hourly price per machine; overrides the trace.", min=0)
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
    from orchestrator.simulation.command import Options
    from orchestrator.simulation.command import simulate as predict

    loaded = load(pipeline, overrides or [], needs_data=False)
    options = Options(trace, costs, cost or (), price, on_demand_price, notice, start, interval or ())
    report = predict(loaded.spec, order(loaded), options)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=1))
    else:
        report.print(_console())


checkpoints = typer.Typer(no_args_is_help=True, help="Inspect the checkpoints of training jobs.")
app.add_typer(checkpoints, name="checkpoint")


@checkpoints.command()
def inspect(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A checkpoint, or a folder of checkpoints.", show_default=False),
    ],
) -> None:
    """Show what a checkpoint contains and verify its checksums. The exit code is 1 if it is damaged."""
    from orchestrator.pipeline.checkpoint_table import print_checkpoints
    from orchestrator.training.checkpoint.inspect import describe_all

    raise typer.Exit(0 if print_checkpoints(_console(), describe_all(folder)) else 1)


@app.command()
def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="[FILE or STORE]", help="A pipeline file, or a store: a folder or an s3:// address."
        ),
    ] = "runs",
) -> None:
    """Read every file in a store and compare it with its manifest. The exit code is 1 if any is damaged."""
    from orchestrator.pipeline.verify import verify as check

    raise typer.Exit(0 if check(_console(), target) else 1)


@app.command()
def doctor(
    store: Annotated[str, typer.Option(help="The store to check: a folder or an s3:// address.")] = "runs",
) -> None:
    """Check the installed packages, the devices, and that the store is writable."""
    from orchestrator.pipeline.doctor import examine

    raise typer.Exit(0 if examine(_console(), store) else 1)


def _choice(
    only: list[str] | None,
    first: str | None,
    last: str | None,
    force: list[str] | None,
    rerun_on: str | None,
    *,
    accept_code: bool,
) -> Choice:
    from orchestrator.pipeline.plan import Choice

    if rerun_on and accept_code:
        raise UserError("--rerun-on code and --accept-code exclude each other", hint="leave one of them out")
    return Choice(tuple(only or ()), first, last, tuple(force or ()), on_code=rerun_on is not None)


def _run(file: Path, overrides: Sequence[str], *, must_exist: bool, choice: Choice | None = None) -> None:
    from orchestrator.pipeline.check import check
    from orchestrator.pipeline.console import print_findings
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.plan import EVERYTHING
    from orchestrator.pipeline.workspace import Workspace

    loaded = load(file, overrides, needs_data=False, gather=True)
    choice = choice or EVERYTHING
    found = check(loaded, runs=True, choice=choice)
    print_findings(_console(), found, incomplete_only=True)
    found.raise_if_any()
    if must_exist and not Workspace(loaded.spec.store).state(loaded.name).started:
        raise UserError(
            f"pipeline {loaded.name!r} was never started",
            where=f"store {loaded.spec.store}",
            hint=f"start it with: {called('run', str(file))}",
        )
    # What was to be made anew is on record: asked for again, it would start over.
    chosen = [part for name in choice.only for part in ("--only", name)]
    chosen += ["--from", choice.first] if choice.first else []
    chosen += ["--until", choice.last] if choice.last else []
    _execute(loaded, found.stages, "run", [*overrides, *chosen], choice)


def _execute(
    loaded: LoadedPipeline,
    stages: list[ResolvedStage],
    command: str,
    arguments: Sequence[str],
    choice: Choice,
) -> NoReturn:
    from orchestrator.config.yaml_source import without_secrets
    from orchestrator.pipeline.console import Reporter
    from orchestrator.pipeline.run import execute

    again = called(command, str(loaded.path), *map(without_secrets, arguments))
    raise typer.Exit(execute(loaded, stages, Reporter(_console(), again, _BEGAN), choice=choice))


def _print_stages(loaded: LoadedPipeline, choice: Choice) -> None:
    from orchestrator.pipeline.check import check
    from orchestrator.pipeline.console import print_findings, print_plan, print_stages
    from orchestrator.pipeline.plan import plan as make_plan
    from orchestrator.pipeline.workspace import Workspace

    found = check(loaded, runs=False, choice=choice)
    if found.errors:
        print_findings(_console(), found)
        found.raise_if_any()
    if loaded.missing:
        # Keys depend on the data's content, so nobody can say what is cached.
        print_stages(_console(), loaded)
        print_findings(_console(), found)
        return
    workspace = Workspace(loaded.spec.store)
    driver = workspace.driver(loaded.name)
    driven = driver is not None and driver.alive
    plans = make_plan(
        found.stages,
        workspace.state(loaded.name),
        workspace.find,
        driven=driven,
        reached=workspace.reached,
        begun_from=workspace.begun_from,
        choice=choice,
    )
    print_plan(_console(), loaded.name, plans)
    print_findings(_console(), found)


def _print_costs(loaded: LoadedPipeline, *, as_json: bool) -> None:
    import json

    from orchestrator.pipeline.cost_table import as_dict, print_costs
    from orchestrator.pipeline.costing import costings

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
        print_costs(_console(), hardware, found)


def _print_splits(loaded: LoadedPipeline, devices: float, *, refresh: bool, as_json: bool) -> None:
    import json

    from orchestrator.pipeline.device_split import as_dict, print_splits, splits

    notes = _console(stderr=True)
    with notes.status("estimating costs") as status:
        found = splits(loaded, devices, refresh=refresh, say=status.update)
    if as_json:
        typer.echo(json.dumps(as_dict(found), indent=1))
    else:
        print_splits(_console(), found)


def _draw_schedules(loaded: LoadedPipeline, picture: Path) -> None:
    from orchestrator.pipeline.schedule_chart import draw

    number = draw(loaded, picture)
    _console().print(
        f"[green]✓[/] Drew {number} schedules into [bold]{picture}[/]", highlight=False, soft_wrap=True
    )


def _console(*, stderr: bool = False) -> Console:
    """A terminal as wide as it is; in a pipe wide enough that nothing is folded."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr) if stream.isatty() else Console(stderr=stderr, width=200)


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def main() -> NoReturn:
    """Entry point: UserErrors, and what a disk, store or file refuses, are printed without traceback; exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A pipe in an ASCII locale cannot take ✓; losing the symbol is better than dying.
            reconfigure(errors="replace", line_buffering=True)
    try:
        app()
    except UserError as error:
        _complain(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        _complain(refusal)
        sys.exit(2)
    sys.exit(0)


def _refusal(error: OSError) -> UserError | None:
    """What a store, a disk or a file did not allow; None of anything else, which may be a mistake of ours."""
    from orchestrator import disk
    from orchestrator.storage.s3_client import StoreError

    if isinstance(error, StoreError):
        what = str(error)
    elif error.errno not in _OF_THE_DISK and not (error.strerror and disk.file_of(error)):
        return None
    elif disk.is_full(error):
        what = disk.described(error, [Path.cwd(), disk.temporary()])
    else:
        what = ": ".join(str(part) for part in (error.strerror, disk.file_of(error)) if part)
    return UserError(what, hint="fix that, then run the same command again: it continues")


def _complain(error: UserError) -> None:
    from rich.text import Text

    console = _console(stderr=True)
    for number, line in enumerate(str(error).splitlines()):
        is_what = not line.startswith("  ")
        text = Text("error: " if number == 0 else "", style="bold red")
        text.append(line, style="default not bold" if is_what else "bright_black not bold")
        console.print(text, soft_wrap=True)
