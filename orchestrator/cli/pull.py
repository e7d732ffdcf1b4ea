"""`pull`: a published model into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal import console


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
    console().print(f"[green]✓[/] {model} is in [bold]{folder}[/]", highlight=False, soft_wrap=True)
