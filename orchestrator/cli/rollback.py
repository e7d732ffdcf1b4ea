"""`rollback`: an alias back to the version that had it before."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.terminal import console


def rollback(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@ALIAS]",
            help="The registered model and its alias. NAME alone means NAME@champion.",
            show_default=False,
        ),
    ],
    to: Annotated[
        int | None,
        typer.Option(
            "--to",
            metavar="VERSION",
            min=1,
            help="The version that gets the alias. Default: the version that had it before.",
            show_default=False,
        ),
    ] = None,
    alias: Annotated[
        str | None, typer.Option(help="The alias, if it is not part of the name.", show_default=False)
    ] = None,
    tracking: Annotated[
        str,
        typer.Option(help="The address of the MLflow server or database.", envvar="MLFLOW_TRACKING_URI"),
    ] = "sqlite:///runs/mlflow.db",
) -> None:
    """Move an alias of a published model back to the version that had it before.

    Later runs do not undo this: they leave the alias alone until the pipeline makes another version.
    """
    from orchestrator.tracking.rollback import rollback as roll_back

    done = roll_back(model, tracking, alias, to)
    lines = (
        f"[green]✓[/] {done.name}@{done.alias} was version {done.before} and is version [bold]{done.now}[/]",
        f"  Version {done.before} is marked as rolled back. To give the alias back: orchestrator publish FILE --force",
    )
    for line in lines:
        console().print(line, highlight=False, soft_wrap=True)
