"""A run whose MLflow server is away, comes back in the middle, or comes back later: `orchestrator sync`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow_server
import pytest
from mlflow import MlflowClient
from ports import free_port
from test_cli import ROOT, TOYS

PIPELINE = """\
name: toy
stages:
  curate: {kind: curate, ticks: 3}
  pretrain: {kind: pretrain, needs: curate, ticks: 40}
"""


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def folder(tmp_path: Path, port: int) -> Path:
    (tmp_path / "toy.yaml").write_text(f"{PIPELINE}tracking: {{uri: 'http://127.0.0.1:{port}'}}\n")
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def command(folder: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(TOYS), *arguments], cwd=folder, env=environment(), capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return said


def number(pattern: str, said: str) -> int:
    found = re.search(pattern, said)
    assert found is not None, said
    return int(found[1].replace(",", ""))


def steps(port: int) -> list[int]:
    """Of the loss of `pretrain`, as the server has them."""
    client = MlflowClient(f"http://127.0.0.1:{port}")
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["curate", "pretrain", "toy"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    (run,) = (run for run in runs if run.info.run_name == "pretrain")
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.mark.long
def test_what_waits_is_said_and_sent_later(
    folder: Path, port: int, tmp_path: Path, empty_database: Path
) -> None:
    shutil.copyfile(empty_database, tmp_path / "server.db")
    said = command(folder, "run", "toy.yaml")
    server = f"MLflow at http://127.0.0.1:{port}"
    assert f"{server} does not answer (connection refused) since " in said
    waits = number(rf"! ([\d,]+) tracking records of 3 runs wait for {server} since ", said)
    assert waits > 43
    assert "the next run sends them, and so does `orchestrator sync toy.yaml`" in said
    assert said.count("does not answer") == 3, "before it begins, when it is noticed, and at the end"

    said = command(folder, "status", "toy.yaml")
    assert f"{waits:,} tracking records of 3 runs wait for {server} since " in said
    assert "`orchestrator sync toy.yaml`" in said

    said = command(folder, "sync", "toy.yaml", code=1)
    assert f"✗ Sent 0; {waits:,} tracking records of 3 runs wait for {server} since " in said
    assert "does not answer (connection refused) since " in said

    with mlflow_server.mlflow_server(
        tmp_path, f"sqlite:///{tmp_path}/server.db", str(tmp_path / "files"), port
    ):
        said = command(folder, "sync", "toy.yaml")
        assert f"✓ Sent {waits:,} tracking records to {server}; nothing waits." in said
        assert steps(port) == list(range(40))
        assert "Nothing waits" in command(folder, "sync", "toy.yaml")
        assert "wait" not in command(folder, "status", "toy.yaml")
        assert steps(port) == list(range(40))


@pytest.mark.long
def test_a_server_that_comes_back_in_the_middle_has_all_at_the_end(
    folder: Path, port: int, tmp_path: Path, empty_database: Path
) -> None:
    shutil.copyfile(empty_database, tmp_path / "server.db")
    hold = folder / "hold-100"
    hold.touch()
    with subprocess.Popen(
        [sys.executable, str(TOYS), "run", "toy.yaml", "stages.pretrain.ticks=200"],
        cwd=folder,
        env=environment() | {"TOY_HOLDS": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        said = ""

        def read_until(text: str) -> None:
            nonlocal said
            assert run.stdout is not None
            while text not in said:
                line = run.stdout.readline()
                assert line, said
                said += line

        read_until("does not answer")
        with mlflow_server.mlflow_server(
            tmp_path, f"sqlite:///{tmp_path}/server.db", str(tmp_path / "files"), port
        ):
            read_until("tracking works again after ")
            hold.unlink()
            said += run.communicate(timeout=120)[0]
            assert run.returncode == 0, said
            assert "tracking records of" not in said
            assert steps(port) == list(range(200))


def test_sync_of_a_pipeline_that_runs_names_who_runs_it(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, str(TOYS), "run", "toy.yaml", "stages.pretrain.ticks=1500"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        while "pretrain" not in run.stdout.readline():
            pass
        said = command(folder, "sync", "toy.yaml", code=2)
        assert f"process {run.pid}" in said
        run.kill()


def test_sync_before_any_run_has_nothing_to_do(folder: Path) -> None:
    assert "Nothing waits" in command(folder, "sync", "toy.yaml")
    assert not (folder / "runs").exists()
