"""`pull`: a published model into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from orchestrator.cli.terminal import console

Format = Literal["safetensors", "timm", "transformers", "onnx", "torch-export"]


def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME[@ALIAS|:VERSION]",
            help="The registered model. NAME alone is its champion, or its newest version if there is none.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to create.", show_default=False)],
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="The format of the folder. Formats other than safetensors are loaded again by their "
            "library in a fresh process, and kept only if the outputs are the same.",
        ),
    ] = "safetensors",
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
    """Download a published model from the registry into a folder, in the format that you choose."""
    if format_ == "safetensors":
        from orchestrator.tracking.download import fetch

        pulled = fetch(model, out, tracking, store)
        console().print(
            f"[green]✓[/] {pulled} is in [bold]{pulled.folder}[/]", highlight=False, soft_wrap=True
        )
        return
    from orchestrator.inference.export import pull_as

    exported = pull_as(format_, model, out, tracking, store)
    for one in exported.differences:
        size = f"{one.batch} × {one.height} × {one.width}"
        console().print(f"  {size:<16} largest difference {one.value:.1e}", highlight=False, soft_wrap=True)
    if exported.left_out is not None:
        console().print(f"[yellow]![/] {exported.left_out}", highlight=False, soft_wrap=True)
    console().print(
        f"[green]✓[/] {exported.pulled} is in [bold]{exported.pulled.folder}[/] for {exported.library}: "
        "load.py loads it, README.md says how",
        highlight=False,
        soft_wrap=True,
    )
