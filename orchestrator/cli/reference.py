"""`explain` and `schema`: what a pipeline file may say."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.terminal import console


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
    from orchestrator.reference.explain import explain as find
    from orchestrator.reference.explain import text

    width = min(console().width, 100)
    typer.echo("\n\n".join(text(each, width) for each in find(key)))


def schema() -> None:
    """Print the JSON Schema of pipeline files. Editors use it to complete keys and to mark mistakes."""
    from orchestrator.reference.json_schema import schema_text

    typer.echo(schema_text(), nl=False)
