"""What a pipeline and its store are like: `status`, `sync`, `gc`, `logs`, `verify`, `doctor`, `checkpoint inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import File, Overrides
from orchestrator.cli.terminal import console


def status(file: File, overrides: Overrides = None) -> None:
    """Show each stage's state, attempts, time and latest metrics, and what has not reached MLflow yet."""
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.maintenance.status import print_status

    print_status(console(), load(file, overrides or []))


def sync(file: File, overrides: Overrides = None) -> None:
    """Send tracking records to MLflow that it has not received, for example after an outage. Runs no stage.

    The exit code is 0 if everything was sent, and 1 if some records are still waiting.
    """
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.tracking.sync import sync as send

    raise typer.Exit(0 if send(console(), load(file, overrides or [], needs_data=False)) else 1)


def gc(
    file: File,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete what is listed.")] = False,
) -> None:
    """List artifacts and unfinished work that no pipeline in the store needs. With --yes, delete them.

    Everything that this file would use, or that a ledger in the store refers to, is kept. Nothing is deleted
    while a pipeline of the store is running.
    """
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.maintenance.gc import collect
    from orchestrator.pipeline.plan.stage_plan import resolve

    loaded = load(file, overrides or [])
    collect(console(), loaded, resolve(loaded), delete=yes)


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
    from orchestrator.pipeline.maintenance.status import read_log

    for line in read_log(load(file, overrides or []), stage, lines):
        typer.echo(line)


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="[FILE or STORE]", help="A pipeline file, or a store: a folder or an s3:// address."
        ),
    ] = "runs",
) -> None:
    """Read every file in a store and compare it with its manifest. The exit code is 1 if any is damaged."""
    from orchestrator.pipeline.maintenance.verify import verify as check

    raise typer.Exit(0 if check(console(), target) else 1)


def doctor(
    store: Annotated[str, typer.Option(help="The store to check: a folder or an s3:// address.")] = "runs",
) -> None:
    """Check the installed packages, the devices, and that the store is writable."""
    from orchestrator.pipeline.check.doctor import examine

    raise typer.Exit(0 if examine(console(), store) else 1)


def inspect(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Checkpoints, or folders of checkpoints.", show_default=False),
    ],
) -> None:
    """Show what checkpoints contain and verify their checksums. The exit code is 1 if any is damaged."""
    from orchestrator.pipeline.maintenance.checkpoint_table import print_checkpoints
    from orchestrator.training.checkpoint.inspect import describe_all

    found = [checkpoint for folder in folders for checkpoint in describe_all(folder)]
    raise typer.Exit(0 if print_checkpoints(console(), found) else 1)
