"""Ray's troubles as a user of the command line meets them, in the middle of a real training stage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import yaml
from ports import free_port

PIPELINE = {
    "name": "troubled",
    "elastic": {"workers": 1, "checkpoint_every_s": 0.5},
    "data": {"photos": {"path": "photos"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 2},
        "pretrain": {
            "kind": "pretrain", "needs": "curate", "model": "vit_femto", "steps": 60,
            "batch_size": 4, "block_size": 2, "optimizer": {"lr": {"peak": 1e-3}},
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "heads": {"hidden": 32, "dino_bottleneck": 16, "dino_prototypes": 64, "ibot_bottleneck": 16,
                      "ibot_prototypes": 64},
        },
    },
}  # fmt: skip

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path) -> Path:
    """A user's folder with a few pictures, a pipeline, and MLflow's database of earlier times."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(
            str(photos / f"{number:02}.jpg"), cv2.resize(small, (80, 60), interpolation=cv2.INTER_CUBIC)
        )
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    (tmp_path / "runs").mkdir()
    shutil.copyfile(empty_database, tmp_path / "runs" / "mlflow.db")
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    """Starts `orchestrator run pipeline.yaml …`."""
    started: list[subprocess.Popen[str]] = []

    def start(*overrides: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "run", "pipeline.yaml", *overrides],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def trained(folder: Path) -> int:
    """The newest step that has a checkpoint."""
    found = folder.glob("runs/work/pretrain-*/checkpoints/step-*/checkpoint.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)


def wait_for_training(folder: Path, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not trained(folder):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def finish(driver: subprocess.Popen[str], code: int) -> str:
    said, _ = driver.communicate(timeout=400)
    assert driver.returncode == code, said
    assert "Traceback" not in said
    return said


def kill_part(driver: subprocess.Popen[str], name: str) -> None:
    """SIGKILL of a process of the driver's own cluster."""
    (part,) = [child for child in psutil.Process(driver.pid).children() if child.name() == name]
    part.kill()


def statuses(folder: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    ids = [found.experiment_id for found in client.search_experiments()]
    return {run.info.run_name: run.info.status for run in client.search_runs(ids)}


def test_sigterm_stops_and_the_same_command_goes_on(folder: Path, run: Run) -> None:
    driver = run("stages.pretrain.steps=100000")
    wait_for_training(folder, driver)
    driver.send_signal(signal.SIGTERM)
    said = finish(driver, 130)
    assert "Stopping" in said
    assert "Continue with:" in said
    assert set(statuses(folder).values()) == {"FINISHED", "KILLED"}
    before = trained(folder)
    assert before

    driver = run("stages.pretrain.steps=100000")
    deadline = time.monotonic() + 240
    while trained(folder) <= before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    driver.send_signal(signal.SIGTERM)
    said = finish(driver, 130)
    log = (folder / "runs/logs/troubled/pretrain.log").read_text()
    assert "attempt 2" in said + log


@pytest.mark.long
def test_the_heads_end_costs_nothing(folder: Path, run: Run) -> None:
    driver = run()
    wait_for_training(folder, driver)
    kill_part(driver, "gcs_server")
    said = finish(driver, 0)
    assert said.count("the head (GCS) of the pipeline's own Ray cluster ended (SIGKILL)") == 1
    assert "restarts" not in said, "a step was lost"
    assert "gcs_client" not in said
    assert "rpc_client" not in said


@pytest.mark.long
def test_the_only_nodes_end_is_a_new_cluster(folder: Path, run: Run) -> None:
    driver = run()
    wait_for_training(folder, driver)
    kill_part(driver, "raylet")
    said = finish(driver, 0)
    assert said.count("the only node (raylet) of the pipeline's own Ray cluster ended (SIGKILL)") == 1
    assert "continues from its latest checkpoint" in said
    assert set(statuses(folder).values()) == {"FINISHED"}


def test_a_hostile_environment(folder: Path, run: Run) -> None:
    """No home, a TMPDIR that is too long for sockets, the address of a cluster that is gone, no token for Ray."""
    long = folder / ("a" * 50) / ("b" * 50)
    long.mkdir(parents=True)
    driver = run(
        "stages.pretrain.steps=2",
        HOME="/dev/null/nowhere",
        TMPDIR=str(long),
        RAY_ADDRESS="192.0.2.1:6379",
        RAY_AUTH_MODE="token",
    )
    finish(driver, 0)


def test_nobody_at_the_address_is_one_message(folder: Path, run: Run) -> None:
    port = free_port()
    said = finish(run(f"cluster.address=127.0.0.1:{port}"), 2)
    assert f"no Ray cluster answers at '127.0.0.1:{port}'" in said
    assert "cluster.address" in said.partition("no Ray cluster answers")[2]
    assert "rpc_client" not in said


def test_a_client_address_is_refused_with_the_way_to_go(folder: Path, run: Run) -> None:
    said = finish(run("cluster.address=ray://127.0.0.1:10001"), 2)
    assert "ray job submit" in said
    assert "docs/clusters.md" in said
