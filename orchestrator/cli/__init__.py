"""The command line. Nothing heavy is imported until a command needs it: `--help` answers at once."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, NoReturn

import typer

from orchestrator import __version__
from orchestrator.cli.init import init
from orchestrator.cli.models import models
from orchestrator.cli.plan import plan
from orchestrator.cli.pull import pull
from orchestrator.cli.reference import explain, schema
from orchestrator.cli.rollback import rollback
from orchestrator.cli.run import publish, resume, run
from orchestrator.cli.simulate import simulate
from orchestrator.cli.state import doctor, gc, inspect, logs, status, sync, verify
from orchestrator.cli.terminal import print_error, refusal
from orchestrator.cli.use import embed, search
from orchestrator.cli.watch import watch
from orchestrator.errors import TerminatedError, UserError

app = typer.Typer(
    name="orchestrator",
    help="Train and distil vision foundation models, with the whole recipe in one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orchestrator {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """The options that come before a command."""


# In the order of `--help`, which lists groups after commands.
for command in (
    init, run, resume, publish, plan, status, watch, sync, gc, logs, pull, rollback, embed, search, models, explain,
    schema, simulate, verify,
    doctor,
):  # fmt: skip
    app.command()(command)
checkpoints = typer.Typer(no_args_is_help=True, help="Inspect the checkpoints of training jobs.")
checkpoints.command()(inspect)
app.add_typer(checkpoints, name="checkpoint")


def _terminate(number: int, frame: object) -> NoReturn:
    raise TerminatedError


def main() -> NoReturn:
    """Entry point: UserErrors, and what a disk, store or file refuses, are printed without traceback; exits with 2."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            # A pipe in an ASCII locale cannot take ✓; losing the symbol is better than dying.
            reconfigure(errors="replace", line_buffering=True)
    # Ends what was begun, such as a folder that is not whole yet; `run` has a handler of its own for it.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except TerminatedError:
        sys.exit(128 + signal.SIGTERM)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        refused = refusal(error)
        if refused is None:
            raise
        print_error(refused)
        sys.exit(2)
    sys.exit(0)
