"""`python -m bench` lists the claims; `python -m bench NAME [--quick]` measures one.

The last line on standard output is the claim as one JSON object. Exits with 0 whatever the figure, with 2 for a
name that is none, and with 1 if the arms cannot be compared or something breaks.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.harness import Claim, UnfairError, as_json, calibrate, cpu_seconds, print_claim
from orchestrator.errors import UserError, nearest


def claims(folder: Path) -> dict[str, str]:
    """Every module of `folder` that has a function `run`, and the first line of its docstring; imports none."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "(no docstring)").splitlines()[0]
    return found


def measure(name: str, *, quick: bool) -> Claim:
    """Run the bench module `name`, with a calibration before and after unless it made its own.

    Raises:
        UserError: there is no such claim.
    """
    known = claims(Path(__file__).parent)
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(known) or 'none'}"
        raise UserError(f"there is no claim {name!r}", where="python -m bench", hint=hint)
    module = importlib.import_module(f"bench.{name}")
    before = calibrate()
    claim: Claim = module.run(quick)
    if claim.calibration:
        return claim
    # Two readings show whether the machine was the same machine at both ends of a run of minutes.
    after = {
        f"{key}_after": value for key, value in calibrate().items() if key in ("gemm_gflops", "copy_gibs")
    }
    return replace(claim, calibration=before | after)


def main(
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
        claim = measure(name, quick=quick)
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
    typer.run(main)
