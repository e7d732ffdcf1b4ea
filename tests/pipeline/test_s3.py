"""A pipeline whose store is a bucket: run, killed, and gone on with from another machine."""

from __future__ import annotations

import json
import os
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
from command_line import command_line
from faulty_proxy import FaultyProxy
from s3_server import S3Server

from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.storage.s3 import S3Store

from .driving import start_command

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(pipeline: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts the real command line on the toy pipeline with the test's place in the bucket as its store."""
    monkeypatch.setenv("TOY_TRACKING", "recorded")
    monkeypatch.setenv("TOY_TRACE", "trace")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    pipeline.write_text(pipeline.read_text().replace("store: runs/", f"store: {s3_uri}"))
    return start_command


def done(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def told(*arguments: str) -> str:
    """What a command says that changes nothing, in this process."""
    code, said = command_line(*arguments)
    assert code == 0, said
    return said


def ran() -> list[tuple[str, int]]:
    """The stages that ran since the last call, and the tick each started at."""
    path = Path("trace")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def another_machine() -> None:
    shutil.rmtree(os.environ["ORCHESTRATOR_CACHE"])


def kinds(store: S3Store) -> set[str]:
    return {name.partition("/")[0] for name in store.list()}


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def ticks(store: S3Store) -> int:
    texts = [store.get_bytes(name) for name in store.list("work/pretrain-") if name.endswith("/ticks")]
    return int(texts[0]) if texts else 0


def test_a_run_is_in_the_bucket_and_another_machine_knows_it(start: Start, s3_uri: str) -> None:
    done(start("run", "toy.yaml"))
    assert [name for name, _ in ran()] == ["curate", "pretrain", "evaluate"]
    store = S3Store(s3_uri)
    assert kinds(store) >= {"artifacts", "ledger", "logs", "pipelines"}
    assert list(store.list("work/")) == []
    assert not Path("runs").exists()
    assert s3_uri in store.get_bytes("pipelines/toy/pipeline.yaml").decode()

    another_machine()
    assert told("plan", "toy.yaml").count("nothing changed") == 3
    assert "up to date" in done(start("run", "toy.yaml"))
    assert ran() == []
    assert not list(store.root.glob("artifacts/*/result.json")), "nothing was fetched to know that"
    assert "tick 1 of 1" in told("logs", "toy.yaml", "pretrain")
    assert "done" in told("status", "toy.yaml")

    another_machine()
    done(start("run", "toy.yaml", "stages.evaluate.ticks=2"))
    assert ran() == [("evaluate", 0)]
    fetched = {path.parent.name.partition("-")[0] for path in store.root.glob("artifacts/*/result.json")}
    assert fetched == {"curate", "pretrain", "evaluate"}, "inputs are fetched when a stage reads them"


def test_a_run_through_a_bad_network_ends_well(
    start: Start, s3: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("500", "503", "drop", "lost", "truncate", "slow")
    with FaultyProxy(s3.endpoint, rate=0.1, kinds=kinds, seed=3) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        done(start("run", "toy.yaml", "stages.pretrain.ticks=20"))
        assert sum(proxy.injected.values()) > 5
        assert [name for name, _ in ran()] == ["curate", "pretrain", "evaluate"]
        assert "up to date" in done(start("run", "toy.yaml", "stages.pretrain.ticks=20"))


@pytest.mark.parametrize(
    "machine", [pytest.param("the same machine", marks=pytest.mark.long), "another machine"]
)
def test_killed_inside_a_stage_it_goes_on(start: Start, s3_uri: str, machine: str) -> None:
    store = S3Store(s3_uri)
    slow = "stages.pretrain.ticks=400"
    driver = start("run", "toy.yaml", slow)
    wait_until(lambda: ticks(store) > 5)
    driver.kill()
    driver.communicate()
    reached = ticks(store)
    assert ran()[-1] == ("pretrain", 0)
    if machine == "another machine":
        another_machine()
    assert "attempt 1 was interrupted" in told("plan", "toy.yaml", slow)

    driver = start("run", "toy.yaml", slow)
    wait_until(lambda: driver.poll() is not None or ticks(store) > reached + 3)
    driver.send_signal(signal.SIGINT)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    (name, tick), *_ = ran()
    assert name == "pretrain"
    assert reached <= tick <= reached + 1
    assert [run["opened"] for run in recorded.by_name("pretrain")] == [2]
    assert store.get_bytes("logs/toy/pretrain.log").decode().count("=== ") == (
        1 if machine == "another machine" else 2
    ), "the log goes to the store at the end of an attempt"


@pytest.mark.slow
def test_killed_at_any_request_it_goes_on(start: Start, s3_uri: str) -> None:
    store = S3Store(s3_uri)
    # All over the life of a run: while it queues, publishes, writes the ledger.
    for pause in (0.9, 1.3, 1.7, 2.1, 2.5):
        driver = start("run", "toy.yaml", "stages.pretrain.ticks=10", f"seed={int(pause * 10)}")
        time.sleep(pause)
        driver.kill()
        driver.communicate()
        done(start("run", "toy.yaml", "stages.pretrain.ticks=10", f"seed={int(pause * 10)}"))
        state = Workspace(s3_uri).state("toy")
        assert {stage.state for stage in state.stages.values()} == {"done"}
        assert not state.open
    assert {run["status"] for run in recorded.runs().values()} <= {"FINISHED", "KILLED"}
    assert list(store.list("work/")) == []
    for manifest in [name for name in store.list("artifacts/") if name.endswith("manifest.json")]:
        folder = manifest.removesuffix("manifest.json")
        assert list(json.loads(store.get_bytes(manifest))["files"]) == ["result.json"]
        assert store.stat(f"{folder}result.json")


def asked(question: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect("file:runs/mlflow.db?mode=ro", uri=True) as database:
        return database.execute(question).fetchall()


@pytest.mark.long
def test_with_mlflow_its_files_are_in_the_bucket_and_records_survive_the_machine(
    start: Start, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOY_TRACKING")
    store = S3Store(s3_uri)
    driver = start("run", "toy.yaml", "stages.pretrain.ticks=400")
    wait_until(lambda: ticks(store) > 3)
    driver.kill()
    driver.communicate()
    # The machine is gone, and what MLflow had of it too. Until the end of the first stage all records are safe.
    another_machine()
    shutil.rmtree("runs", ignore_errors=True)
    expected = dict.fromkeys(["toy", "curate", "pretrain", "evaluate"], "FINISHED")
    # A run does not wait for MLflow for ever; what it could not send, the next one does.
    for _ in range(4):
        done(start("run", "toy.yaml", "stages.pretrain.ticks=30"))
        if dict(asked("select name, status from runs where status != 'KILLED'")) == expected:
            break
    assert dict(asked("select name, status from runs where status != 'KILLED'")) == expected
    count = "select count(*) from metrics join runs using (run_uuid) where name='curate' and key='train/loss'"
    assert asked(count) == [(1,)]
    ((location,),) = asked("select artifact_location from experiments where name='toy'")
    assert location == f"{s3_uri}/mlartifacts"
    assert any(name.endswith("/pipeline/pipeline.yaml") for name in store.list("mlartifacts/"))
    assert any(name.endswith("/logs/pretrain.log") for name in store.list("mlartifacts/"))
    assert not Path("runs/mlartifacts").exists()


@pytest.mark.usefixtures("start")
def test_a_wrong_secret_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-to-be-seen")
    for command in ("run", "plan", "status"):
        code, said = command_line(command, "toy.yaml")
        assert code == 2
        assert "refuses the secret key" in said
        assert "Traceback" not in said
        assert "never-to-be-seen" not in said


def test_the_doctor_tries_the_bucket(start: Start, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{s3_uri} can be written" in done(start("doctor", "--store", s3_uri))
    assert list(S3Store(s3_uri).list()) == []
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    driver = start("doctor", "--store", s3_uri)
    assert "does not know the access key" in driver.communicate(timeout=60)[0]
    assert driver.returncode == 1


@pytest.mark.usefixtures("start")
def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    code, said = command_line("plan", "toy.yaml", "store=s3://me:never-to-be-seen@bucket/prefix")
    assert code == 2
    assert "store holds user information" in said
    assert "never-to-be-seen" not in said
