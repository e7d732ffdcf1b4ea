"""`run`, `resume` and `publish`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from orchestrator.cli.options import AcceptCode, File, First, Force, Last, Only, Overrides, RerunOn, choice_of
from orchestrator.cli.terminal import console
from orchestrator.errors import UserError
from orchestrator.shell_command import command as called

if TYPE_CHECKING:
    from orchestrator.pipeline.load import LoadedPipeline
    from orchestrator.pipeline.plan.stage_plan import Choice, ResolvedStage

# What a run takes begins here: reading the file and looking at the data belong to it.
BEGAN = time.monotonic()


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
    choice = choice_of(only, first, last, force, rerun_on, accept_code=accept_code)
    _run(file, overrides or [], must_exist=False, choice=choice)


def resume(file: File, overrides: Overrides = None) -> None:
    """Continue a pipeline that was stopped or failed. Unlike run, it refuses a pipeline that was never started."""
    _run(file, overrides or [], must_exist=True)


def publish(
    file: File,
    overrides: Overrides = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Move the alias even if a condition does not hold or the version was rolled back."
        ),
    ] = False,
) -> None:
    """Update the model registry so that it matches the pipeline file. Runs no other stage."""
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.plan.stage_plan import resolve
    from orchestrator.pipeline.run.driver import publishing

    loaded = load(file, overrides or [])
    stages = resolve(loaded)
    _execute(loaded, stages, "publish", overrides or [], publishing(loaded, stages, force=force))


def _run(file: Path, overrides: Sequence[str], *, must_exist: bool, choice: Choice | None = None) -> None:
    from orchestrator.pipeline.check.pipeline_check import check
    from orchestrator.pipeline.console import print_findings
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.plan.stage_plan import EVERYTHING
    from orchestrator.pipeline.store.workspace import Workspace

    loaded = load(file, overrides, needs_data=False, gather=True)
    choice = choice or EVERYTHING
    found = check(loaded, runs=True, choice=choice)
    print_findings(console(), found, incomplete_only=True)
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
    from orchestrator.config.private_values import without_secrets
    from orchestrator.pipeline.console import Reporter
    from orchestrator.pipeline.run.driver import execute

    again = called(command, str(loaded.path), *map(without_secrets, arguments))
    raise typer.Exit(execute(loaded, stages, Reporter(console(), again, BEGAN), choice=choice))
