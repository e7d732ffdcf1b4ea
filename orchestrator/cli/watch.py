"""`watch`: which checkpoint of a stage that trains is the best so far."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import File, Overrides
from orchestrator.cli.terminal import console

WatchedStage = Annotated[
    str,
    typer.Argument(
        metavar="STAGE",
        help="A stage that trains: of kind pretrain, gram_anchor, high_res, finetune or distill. STAGE/STUDENT is "
        "one student of a distill stage alone.",
        show_default=False,
    ),
]
MetricNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A metric to compute for each backbone. Can be repeated. Default: knn. A finetune stage is scored by "
        "the metrics of its task instead.",
        show_default=False,
    ),
]
ChosenBy = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC[/FIGURE]",
        help="The figure by which the best checkpoint is chosen. Default: the first metric's, or for a finetune "
        "stage the one by which the stage itself chooses.",
        show_default=False,
    ),
]
KeptIn = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="The folder that the best model so far is written into. With several students, each has its own "
        "subfolder.",
        show_default=False,
    ),
]
RegisteredAs = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The registered model that gets each new best model as a version. With several students, each has its "
        "own: NAME-STUDENT.",
        show_default=False,
    ),
]
Alias = Annotated[
    str | None,
    typer.Option(
        metavar="ALIAS",
        help="The alias that moves to each better version, with --register. Default: best-so-far. Aliases that "
        "`publish` or another program sets are refused.",
        show_default=False,
    ),
]


def watch(
    file: File,
    stage: WatchedStage,
    overrides: Overrides = None,
    metric: MetricNames = None,
    by: ChosenBy = None,
    every: Annotated[
        float, typer.Option(help="The time between two checks for new checkpoints, in seconds.", min=0.1)
    ] = 10.0,
    keep: KeptIn = None,
    register: RegisteredAs = None,
    alias: Alias = None,
    once: Annotated[
        bool, typer.Option("--once", help="Score the checkpoints that are there, and end.")
    ] = False,
) -> None:
    """Score the checkpoints of a stage while it trains, and say which is the best.

    Backbones are scored on the photos with labels, each judged by all others. Fine-tuned models are scored on their
    validation split. The figures are also logged to MLflow, in a run of their own. The command ends when the stage is
    done, or when nobody runs it any more.
    """
    from rich.text import Text

    from orchestrator import disk
    from orchestrator.errors import UserError
    from orchestrator.pipeline.load import load
    from orchestrator.pipeline.watch.register import BEST_SO_FAR, Registering
    from orchestrator.pipeline.watch.watcher import WatchOptions, watch

    if alias is not None and register is None:
        raise UserError("there is nothing to give the alias to", where="--alias", hint="add --register NAME")
    terminal = console()
    options = WatchOptions(
        metrics=tuple(metric or ()),
        by=by,
        every_s=every,
        keep=None if keep is None else disk.named(keep),
        register=None if register is None else Registering(register, alias or BEST_SO_FAR),
        once=once,
    )
    loaded = load(file, overrides or [])
    watch(loaded, stage, options, lambda line: terminal.print(Text(line), soft_wrap=True))
