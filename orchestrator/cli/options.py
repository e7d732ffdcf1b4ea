"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.pipeline.plan.stage_plan import Choice

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


def choice_of(
    only: list[str] | None,
    first: str | None,
    last: str | None,
    force: list[str] | None,
    rerun_on: str | None,
    *,
    accept_code: bool,
) -> Choice:
    """The stages that these options choose.

    Raises:
        UserError: they exclude each other.
    """
    from orchestrator.pipeline.plan.stage_plan import Choice

    if rerun_on and accept_code:
        raise UserError("--rerun-on code and --accept-code exclude each other", hint="leave one of them out")
    return Choice(tuple(only or ()), first, last, tuple(force or ()), on_code=rerun_on is not None)
