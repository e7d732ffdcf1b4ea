"""`watch`: which checkpoint of a stage that trains is the best so far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import File, Overrides
from orchestrator.cli.terminal import console


def watch(
    file: File,
    stage: Annotated[
        str,
        typer.Argument(
            metavar="STAGE",
            help="A stage of kind pretrain, gram_anchor or high_res that trains.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A metric to compute of each checkpoint. Can be repeated. Default: knn.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC[/FIGURE]",
            help="The figure by which the best checkpoint is chosen. Default: the first one.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        float, typer.Option(help="The time between two looks for new checkpoints, in seconds.", min=0.1)
    ] = 10.0,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="The folder that the best model so far is written into.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Score the checkpoints that are there, and end.")
    ] = False,
) -> None:
    """Score the checkpoints of a stage while it trains, and say which is the best.

    The figures are of the photos with labels, each judged by all others. They are also metrics of a run in MLflow. The
    command ends when the stage is done or nobody runs it any more.
    """
    from rich.text import Text

    from orchestrator import disk
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.watch import WatchOptions, watch

    terminal = console()
    options = WatchOptions(
        metrics=tuple(metric or ("knn",)),
        by=by,
        every_s=every,
        keep=None if keep is None else disk.named(keep),
        once=once,
    )
    loaded = load(file, overrides or [])
    watch(loaded, stage, options, lambda line: terminal.print(Text(line), soft_wrap=True))
