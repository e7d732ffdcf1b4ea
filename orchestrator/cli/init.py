"""`init`: a first pipeline file for a folder of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.cli.terminal import console

if TYPE_CHECKING:
    from orchestrator.first_pipeline.proposal import FirstPipeline


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder of pictures.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The pipeline file to write. It is never overwritten.")
    ] = Path("pipeline.yaml"),
    recipe: Annotated[
        Literal["distil", "pretrain"],
        typer.Option(
            help="The kind of training: distil learns from trained teachers, pretrain starts from nothing."
        ),
    ] = "distil",
    minutes: Annotated[
        float | None,
        typer.Option(
            help="The time that the run may take, in minutes. Default: 12 without a GPU, 480 with one.",
            min=2,
            max=100_000,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a first pipeline file for a folder of pictures, with numbers that fit them and this machine.

    It looks at the pictures, at a table of captions or labels among them, at the names of sub-folders and at the
    machine, and measures how fast the models run here. Every number is explained in the file.
    """
    from orchestrator.data.sources.survey import survey
    from orchestrator.first_pipeline.proposal import first_pipeline

    with console(stderr=True).status("looking at the pictures") as status:
        found = survey(folder)
        status.update("measuring how fast models run here")
        pipeline = first_pipeline(found, out, recipe, minutes)
    pipeline.write()
    _print_proposal(pipeline)


def _print_proposal(pipeline: FirstPipeline) -> None:
    from rich.table import Table
    from rich.text import Text

    from orchestrator.first_pipeline.proposal import summary

    screen = console()
    table = Table.grid(padding=(0, 2))
    for name, text, is_warning in summary(pipeline):
        table.add_row(Text(name), Text(text, style="yellow" if is_warning else ""))
    screen.print(table)
    written = [str(path) for path in (pipeline.out, pipeline.labels_table) if path is not None]
    screen.print(Text.assemble(("✓ ", "green"), f"Wrote {' and '.join(written)}. Next:"), soft_wrap=True)
    for line in pipeline.next_commands():
        screen.print(Text(f"  {line}"), soft_wrap=True)
