"""`python -m bench` lists the claims; `python -m bench NAME [--quick] [--OPTION VALUE]` measures one.

A claim's options are the further parameters of its `run`.

The last line on standard output is the claim as one JSON object. Exits with 0 whatever the figure, with 2 for a
name that is none, and with 1 if the arms cannot be compared or something breaks.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from bench.harness import Claim, UnfairError, as_json, calibrate, cpu_seconds, print_claim
from orchestrator.errors import UserError, first_line, nearest


def claims(folder: Path) -> dict[str, str]:
    """Every module or package of `folder` that has a function `run`, and its docstring's first line; imports none."""
    found = {}
    for path in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            name = path.parent.name if path.name == "__init__.py" else path.stem
            found[name] = (ast.get_docstring(tree) or "(no docstring)").splitlines()[0]
    return found


def measure(name: str, *, quick: bool, arguments: Sequence[str] = ()) -> Claim:
    """Run the bench module `name`, with a calibration before and after unless it made its own.

    Args:
        name: of the claim.
        quick: whether to run its small form.
        arguments: its own options, as `--name value` pairs.

    Raises:
        UserError: there is no such claim, or it has no such option.
    """
    known = claims(Path(__file__).parent)
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(known) or 'none'}"
        raise UserError(f"there is no claim {name!r}", where="python -m bench", hint=hint)
    module = importlib.import_module(f"bench.{name}")
    given = options(module.run, arguments)
    before = calibrate()
    claim: Claim = module.run(quick, **given)
    if claim.calibration:
        return claim
    # Two readings show whether the machine was the same machine at both ends of a run of minutes.
    after = {
        f"{key}_after": value for key, value in calibrate().items() if key in ("gemm_gflops", "copy_gibs")
    }
    return replace(claim, calibration=before | after)


def options(run: Callable[..., Claim], arguments: Sequence[str]) -> dict[str, Any]:
    """The claim's own options, by the names and types of the further parameters of its `run`.

    Raises:
        UserError: an option that it does not have, one without a value, or a value of another type.
    """
    known = {name: hint for name, hint in get_type_hints(run).items() if name not in ("quick", "return")}
    names = [argument.removeprefix("--").replace("-", "_") for argument in arguments[::2]]
    given: dict[str, Any] = {}
    for number, name in enumerate(names):
        option = arguments[2 * number]
        if name not in known or not option.startswith("--"):
            hint = f"it has {', '.join(f'--{one}' for one in known)}" if known else "it has none"
            raise UserError(f"this claim has no option {option!r}", where="python -m bench", hint=hint)
        if 2 * number + 1 == len(arguments):
            raise UserError(f"{option} needs a value", where="python -m bench")
        value = arguments[2 * number + 1]
        try:
            given[name] = TypeAdapter(known[name]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{option} {value}: {first_line(error)}", where="python -m bench") from None
    return given


def main(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="The claim; without it all are listed.")] = None,
    quick: Annotated[bool, typer.Option(help="A smaller run that shows that it works.")] = False,
) -> None:
    """Measure one performance claim."""
    stream = sys.stdout
    console = Console() if stream.isatty() else Console(width=140)
    if name is None:
        for known, line in claims(Path(__file__).parent).items():
            console.print(f"[bold]{known:<14}[/] {line}", highlight=False, soft_wrap=True)
        return
    started, cpu = time.perf_counter(), cpu_seconds()
    try:
        claim = measure(name, quick=quick, arguments=context.args)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except UnfairError as error:
        typer.echo(f"error: the arms cannot be compared: {error}", err=True)
        raise typer.Exit(1) from None
    print_claim(console, name, claim)
    seconds = {"wall_s": time.perf_counter() - started, "cpu_s": cpu_seconds() - cpu}
    stream.write(as_json(claim, name=name, quick=quick, **seconds) + "\n")
    stream.flush()
    # What Ray and others still say while they shut down must not come after the last line.
    os.dup2(sys.stderr.fileno(), stream.fileno())


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
