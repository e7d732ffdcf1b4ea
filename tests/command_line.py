"""The command line in this process, for tests of what it says: another interpreter takes a second to start."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.pipeline import load
from orchestrator.pipeline.store import ledger
from orchestrator.pipeline.tracking import tracking_run

sys.path.insert(0, str(Path(__file__).parent / "pipeline"))
import recorded
import toys


def command_line(*arguments: str, folder: Path | None = None, toy: bool = True) -> tuple[int, str]:
    """Exit code and output of `orchestrator …`.

    Args:
        arguments: of the command line.
        folder: where it runs; default: here.
        toy: with toy stages and without MLflow, as `pipeline/toy_main.py` runs it.
    """
    output, on_term = io.StringIO(), signal.getsignal(signal.SIGTERM)
    code: str | int | None = None
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.chdir(folder or Path.cwd()),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            patch.setattr(sys, "argv", ["orchestrator", *arguments])
            if toy:
                patch.setattr(load, "_all_stages", lambda: toys.ToyStage)
                patch.setattr(tracking_run, "open_tracking", recorded.open_recorded)
            # A new process has said nothing, and nobody but it listens to its warnings.
            patch.setattr(ledger, "_warned", set())
            patch.setattr(logging.root, "handlers", [])
            cli.main()
    except SystemExit as ended:
        code = ended.code
    finally:
        signal.signal(signal.SIGTERM, on_term)
    assert isinstance(code, int), "it ended by itself"
    return code, output.getvalue()
