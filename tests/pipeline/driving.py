"""Runs and plans a toy pipeline in this process, without a tracking server."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import recorded
import toys
from rich.console import Console

from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice, StagePlan, plan, resolve
from orchestrator.pipeline.run.driver import execute
from orchestrator.pipeline.store.workspace import Workspace

MAIN = Path(__file__).with_name("toy_main.py")


def start_command(*arguments: str) -> subprocess.Popen[str]:
    """The real command line with toy stages, as a process whose output is read together."""
    return subprocess.Popen(
        [sys.executable, str(MAIN), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(path: Path, *overrides: str, choice: Choice = EVERYTHING) -> tuple[int, str]:
    """Exit code and output."""
    loaded = load(path, overrides, stage_type=toys.ToyStage)
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=200), "orchestrator run toy.yaml")
    code = execute(
        loaded, resolve(loaded, content), reporter, open_tracking=recorded.open_recorded, choice=choice
    )
    return code, output.getvalue()


def planned(path: Path, *overrides: str, choice: Choice = EVERYTHING) -> dict[str, StagePlan]:
    """What would happen, by stage."""
    loaded = load(path, overrides, stage_type=toys.ToyStage)
    workspace = Workspace(loaded.spec.store)
    plans = plan(
        resolve(loaded, content),
        workspace.state(loaded.name),
        workspace.find,
        begun_from=workspace.begun_from,
        choice=choice,
    )
    return {item.name: item for item in plans}


def content(source: object, name: str) -> str:
    """A dataset's fingerprint that can be read."""
    return "".join(path.read_text() for path in sorted(Path("photos").iterdir()))
