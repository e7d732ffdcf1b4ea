"""SIGKILL at every durable write and in the middle of a stage: the same command goes on."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recorded
import toys
from command_line import command_line
from rich.console import Console

from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.lease import process_identity
from orchestrator.pipeline.lease.lease_manager import LeaseManager
from orchestrator.pipeline.lease.liveness import Timing
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import resolve
from orchestrator.pipeline.run.driver import execute
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.storage.local import LocalStore

from .driving import start_command

STAGES = ("curate", "pretrain")
SHORT = """\
name: toy
stages:
  curate: {kind: curate, ticks: 0}
  pretrain: {kind: pretrain, needs: curate, ticks: 0}
"""


def drive(die_at: int, overrides: tuple[str, ...] = ()) -> None:
    """Run the pipeline in this process, which dies before its durable write number `die_at`."""
    writes = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (LocalStore, "put_bytes"),
        (LocalStore, "put_file"),
        (recorded.RecordedRun, "_write"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    loaded = load("toy.yaml", overrides, stage_type=toys.ToyStage)
    reporter = Reporter(Console(file=io.StringIO()))
    stages = resolve(loaded, lambda source, name: "same")
    os._exit(execute(loaded, stages, reporter, open_tracking=recorded.open_recorded))


def forked(die_at: int, *overrides: str) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=drive, args=(die_at, overrides))
    child.start()
    child.join(20)
    return child.exitcode


def assert_whole() -> None:
    """All done, nothing RUNNING, and one run a stage for what is done."""
    state = Workspace("runs/").state("toy")
    assert {name: state.stages[name].state for name in STAGES} == dict.fromkeys(STAGES, "done")
    assert not state.open
    assert {run["status"] for run in recorded.runs().values()} <= {"FINISHED", "KILLED"}
    for name in (*STAGES, "toy"):
        finished = [run for run in recorded.by_name(name) if run["status"] == "FINISHED"]
        assert len(finished) == 1, name


@pytest.mark.long
def test_killed_before_any_write_it_goes_on(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(SHORT)
    monkeypatch.setenv("TOY_TRACE", "trace")
    died = 0
    for die_at in range(1, 100):
        for leftover in ("runs", "tracking.jsonl", "trace"):
            subprocess.run(["rm", "-rf", leftover], check=True)
        if forked(die_at) == 0:
            break
        died += 1
        before = {name for name in STAGES if list(Path("runs/artifacts").glob(f"{name}-*/manifest.json"))}
        Path("trace").unlink(missing_ok=True)
        assert forked(0) == 0
        assert_whole()
        assert not list(Path("runs/work").glob("*/"))
        assert len(recorded.by_name("toy")) == 1
        assert {len(recorded.by_name(name)) for name in STAGES} == {1}, "a broken stage keeps its run"
        ran = (
            [line.split()[0] for line in Path("trace").read_text().splitlines()]
            if Path("trace").exists()
            else []
        )
        assert set(ran) == set(STAGES) - before, "finished stages are skipped"
    assert died > 25


def test_killed_and_then_changed_it_closes_the_run_it_gives_up(write: Callable[[str], Path]) -> None:
    write(SHORT)
    for die_at in range(10, 21, 3):
        for leftover in ("runs", "tracking.jsonl"):
            subprocess.run(["rm", "-rf", leftover], check=True)
        assert forked(die_at) == -signal.SIGKILL
        assert forked(0, "stages.pretrain.optim.lr=0.9") == 0
        published = list(Path("runs/artifacts").glob("pretrain-*/manifest.json"))
        finished = [run for run in recorded.by_name("pretrain") if run["status"] == "FINISHED"]
        assert len(finished) == len(published), (
            "a run that was given up is FINISHED only if its artifact is there"
        )
        assert {run["status"] for run in recorded.runs().values()} <= {"FINISHED", "KILLED"}


@pytest.fixture
def start(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.Popen[str]]:
    """Starts the real command line on the toy pipeline."""
    monkeypatch.setenv("TOY_TRACKING", "recorded")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return start_command


def wait_until(condition: Callable[[], object], seconds: float = 60.0, every: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(every)


def ticks() -> int:
    """How far the pretrain stage is, from its work folder."""
    texts = [path.read_text() for path in Path("runs/work").glob("pretrain-*/ticks")]
    return int(texts[0]) if texts and texts[0] else 0


def ledger_texts() -> list[str]:
    """The ledger's events, as written, oldest first."""
    return [path.read_text() for path in sorted(Path("runs/ledger/toy").glob("*.json"))]


SLOW = "stages.pretrain.ticks=300"


def test_killed_inside_a_stage_it_goes_on_in_the_same_folder(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    driver = start("run", "toy.yaml", SLOW)
    wait_until(lambda: ticks() > 5)
    assert f"It is being run by process {driver.pid} on " in command_line("status", "toy.yaml")[1]
    driver.send_signal(signal.SIGSTOP)
    assert f"suspended: `kill -CONT {driver.pid}` resumes it" in command_line("status", "toy.yaml")[1]
    driver.kill()
    driver.communicate()
    reached = ticks()
    said = command_line("status", "toy.yaml")[1]
    assert "interrupted" in said
    assert f"no heartbeat from process {driver.pid} on " in said
    assert "attempt 1 was interrupted" in command_line("plan", "toy.yaml", SLOW)[1]

    driver = start("run", "toy.yaml", SLOW)
    wait_until(lambda: ticks() > reached + 3)
    attempts = next(Path("runs/work").glob("pretrain-*/attempts")).read_text().splitlines()
    assert len(attempts) == 2
    opened = [text for text in ledger_texts() if '"opened"' in text]
    assert len(opened) == 2
    assert "taken over from process " in opened[1]
    assert int(attempts[1].split()[1]) in (reached, reached + 1), (
        "the second attempt starts where the first was"
    )
    driver.kill()
    driver.communicate()
    assert [run["opened"] for run in recorded.by_name("pretrain")] == [2]


def test_a_suspended_driver_that_was_replaced_ends_and_writes_nothing(
    start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_TIMEOUT", "1.5")
    driver = start("run", "toy.yaml", "stages.pretrain.ticks=3000")
    wait_until(lambda: ticks() > 5)
    driver.send_signal(signal.SIGSTOP)
    # As on another machine: the kernel's word on the driver counts for nothing.
    monkeypatch.setattr(process_identity, "_machine", lambda: "elsewhere")
    workspace = Workspace("runs/")
    workspace.leases = LeaseManager(workspace.store(), Timing(heartbeat_s=0.2, timeout_s=1.5))
    with workspace.drive("toy") as lease:
        assert "without a heartbeat for " in lease.notes[0]
        ledger = workspace.ledger("toy", lease)
        ledger.append("opened", run_id="ours")
        before = ledger_texts()
        driver.send_signal(signal.SIGCONT)
        said, _ = driver.communicate(timeout=60)
        assert driver.returncode == 1
        assert "Ended: lost the lock on pipeline 'toy': " in said
        assert "Nothing more was written" in said
        assert "Traceback" not in said
        assert ledger_texts() == before
        assert ledger.refresh().run_id == "ours"
    assert recorded.by_name("pretrain")[0]["status"] == "RUNNING", "the run is the new driver's to end"
    assert recorded.by_name("toy")[0]["status"] == "RUNNING"


def test_the_first_interrupt_stops_cleanly(start: Callable[..., subprocess.Popen[str]]) -> None:
    driver = start("run", "toy.yaml", SLOW)
    wait_until(lambda: ticks() > 5)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert f"orchestrator run toy.yaml {SLOW}" in said
    assert "Traceback" not in said
    assert recorded.by_name("pretrain")[0]["status"] == "KILLED"
    assert recorded.by_name("toy")[0]["status"] == "KILLED"
    state = Workspace("runs/").state("toy")
    assert state.stages["pretrain"].state == "stopped"
    assert "evaluate" not in state.stages
    assert "stopped" in command_line("status", "toy.yaml")[1]


def test_the_second_interrupt_aborts_at_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    driver = start("run", "toy.yaml", SLOW, "stages.pretrain.mode=stubborn")
    wait_until(lambda: ticks() > 5)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert driver.poll() is None, "the stage does not heed the first one"
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=30)
    assert driver.returncode == 130
    assert re.search(r"pretrain +■ interrupted", said), said
    assert "■ Aborted after " in said
    assert f"orchestrator run toy.yaml {SLOW}" in said
    assert recorded.by_name("pretrain")[0]["status"] == "KILLED"
    driver = start("run", "toy.yaml", "stages.pretrain.ticks=2")
    assert driver.wait(60) == 0
    assert {run["status"] for run in recorded.runs().values()} == {"KILLED", "FINISHED"}


def test_with_mlflow_a_killed_driver_leaves_no_run_running(
    start: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> None:
    monkeypatch.delenv("TOY_TRACKING")
    Path("runs").mkdir()
    shutil.copyfile(empty_database, "runs/mlflow.db")

    def statuses() -> dict[str, list[str]]:
        try:
            with sqlite3.connect("file:runs/mlflow.db?mode=ro", uri=True) as database:
                rows = database.execute("select name, status from runs").fetchall()
        except sqlite3.OperationalError:
            return {}
        return {name: [status for other, status in rows if other == name] for name, _ in rows}

    driver = start("run", "toy.yaml", "stages.pretrain.ticks=8000")
    wait_until(lambda: statuses().get("pretrain") == ["RUNNING"], 120, every=0.3)
    driver.kill()
    driver.communicate()
    expected = {
        "toy": ["FINISHED"],
        "curate": ["FINISHED"],
        "pretrain": ["KILLED", "FINISHED"],
        "evaluate": ["FINISHED"],
    }
    # A run does not wait for MLflow for ever; what it could not send, the next one does.
    for _ in range(3):
        assert start("run", "toy.yaml", "stages.pretrain.ticks=1").wait(120) == 0
        if statuses() == expected:
            break
    assert statuses() == expected
