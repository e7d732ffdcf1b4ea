"""`models`: the models that a pipeline file can use."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.terminal import console


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that a pipeline file can use, with parameters and operations at 256 and 512 px."""
    import json

    from orchestrator.reference.model_table import model_rows, print_models

    if as_json:
        typer.echo(json.dumps(model_rows(), indent=1))
    else:
        print_models(console())
