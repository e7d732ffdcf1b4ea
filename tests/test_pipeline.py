"""The whole pipeline on the real stack: Ray, DeepSpeed ZeRO-3, MLflow, killed once in the middle and resumed.

It runs from a folder with `models/` and `stages/` packages of the user's own, beside another Ray cluster that is
alive at first and dead later.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import yaml
from command_line import command_line

ORCHESTRATOR = [sys.executable, "-m", "orchestrator"]
HEADS = {
    "hidden": 32,
    "dino_bottleneck": 16,
    "dino_prototypes": 64,
    "ibot_bottleneck": 16,
    "ibot_prototypes": 64,
}
SSL = {
    "batch_size": 16,
    "block_size": 8,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 2}},
    "ema": {"peak": 0.9},
}
PIPELINE = {
    "name": "small",
    "elastic": {"workers": [1, 2], "checkpoint_every_s": 0.5},
    "data": {"photos": {"path": "photos", "captions": "photos/captions.csv"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 4, "sample": 0.4},
        "pretrain": {
            **SSL, "kind": "pretrain", "needs": "curate", "model": "vit_femto", "heads": HEADS, "steps": 30,
            "homogeneous": "photos", "snapshot_every": 10,
            # Never fewer: where the second process starts late, a job this short would end before it grows.
            "elastic": {"workers": 2},
        },
        "gram": {
            **SSL, "kind": "gram_anchor", "needs": ["curate", "pretrain"], "steps": 4,
            "crops": {**SSL["crops"], "gram_size": 64}, "gram": {"teacher": 10, "first_update": 2},
        },
        "high_res": {
            **SSL, "kind": "high_res", "needs": ["curate", "gram"], "steps": 3, "crops": {"num_local": 2},
            "resolutions": [
                {"global_size": 48, "local_size": 16, "gram_size": 64, "p": 0.5},
                {"global_size": 64, "local_size": 24, "gram_size": 96, "p": 0.5},
            ],
        },
        "distill": {
            **SSL, "kind": "distill", "needs": ["curate", "high_res"], "steps": 4, "elastic": {"workers": 1},
            "students": {"vit-femto": {"model": "vit_femto"}, "convnext-mini": {"model": "convnext_mini"}},
        },
        "align_text": {
            "kind": "align_text", "needs": ["curate", "distill"], "student": "vit-femto", "steps": 3,
            "batch_size": 16, "block_size": 8, "image_size": 32, "text": {"dim": 32, "depth": 1, "num_heads": 2},
            "optimizer": {"lr": {"peak": 1e-3}},
        },
        "evaluate": {
            "kind": "evaluate", "needs": ["curate", "pretrain", "gram", "high_res", "distill", "align_text"],
            "num_groups": 3, "num_snapshots": 1, "num_pictures": 2,
        },
        "publish": {"kind": "publish", "needs": ["distill", "evaluate"]},
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: photos with names and groups, a pipeline file, and packages named like ours."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file,caption,label"]
    for number in range(48):
        group = number % 3
        pixels = cv2.resize(
            rng.integers(0, 128, (5, 7, 3), dtype=np.uint8), (90, 60), interpolation=cv2.INTER_CUBIC
        )
        pixels[..., group] = np.minimum(255, pixels[..., group].astype(int) + 120)
        cv2.imwrite(str(photos / f"{number:02}.jpg"), pixels)
        lines.append(f"{number:02}.jpg,thing number {number},group {group}")
    (photos / "captions.csv").write_text("\n".join(lines))
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    for name in ("models", "stages", "objectives"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user keeps own things here')\n")
    return tmp_path


@pytest.fixture
def other_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[psutil.Process]]:
    """Somebody else's Ray cluster on this machine, in Ray's default place; its processes, to be killed."""
    log = (tmp_path_factory.mktemp("other") / "log").open("w")
    command = ["ray", "start", "--head", "--block", "--port=0", "--num-cpus=1", "--include-dashboard=false"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    other = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    root = psutil.Process(other.pid)
    wait_for(lambda: any("raylet" in child.name() for child in root.children(recursive=True)), 180)
    processes = [root, *root.children(recursive=True)]
    yield processes
    kill_all(processes)


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def wait_for(condition: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def orchestrate(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [*ORCHESTRATOR, *arguments], cwd=folder, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def ask(folder: Path, *arguments: str) -> str:
    """What a command that trains nothing says."""
    code, said = command_line(*arguments, folder=folder, toy=False)
    assert code == 0, said
    return said


@pytest.mark.timeout(900)
def test_whole_pipeline_killed_once(folder: Path, other_cluster: list[psutil.Process]) -> None:
    first = subprocess.Popen(
        [*ORCHESTRATOR, "run", "pipeline.yaml"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = folder / "runs" / "work"
    wait_for(lambda: list(checkpoints.glob("pretrain-*/checkpoints/step-*/checkpoint.json")), 240)
    workers = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    psutil.wait_procs(workers, timeout=60)
    assert not [child for child in workers if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert all(process.is_running() for process in other_cluster), "somebody else's cluster was touched"
    kill_all(other_cluster)  # its address file stays behind in Ray's folder

    said = orchestrate(folder, "run", "pipeline.yaml")
    assert "attempt 1 was interrupted" in said
    check_tracking(folder)
    check_artifacts(folder)
    assert "othing to do" in ask(folder, "run", "pipeline.yaml")

    check_replan(folder)
    ask(folder, "pull", "small-vit-femto@champion", "--out", "pulled")
    assert {path.name for path in (folder / "pulled").iterdir()} >= {"README.md", "config.json"}
    snippet = (
        "import numpy as np; from orchestrator.models import embed, load_pretrained;"
        "print(embed(load_pretrained('pulled'), np.zeros((40, 60, 3), np.uint8), 32).shape)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert "[48]" in shown.stdout, shown.stderr


def check_tracking(folder: Path) -> None:
    """Every run has ended, nested as it should be, and no metric has two values for one step."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "small"]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = Counter(run.info.run_name for run in runs)
    assert max(names.values()) == 1, names
    assert {"curate", "pretrain", "distill", "distill/vit-femto", "distill/convnext-mini", "publish"} <= set(
        names
    )
    by_name = {run.info.run_name: run for run in runs}
    for name, steps in (("pretrain", 30), ("gram", 4), ("distill/vit-femto", 4)):
        history = client.get_metric_history(by_name[name].info.run_id, "train/loss")
        assert sorted(metric.step for metric in history) == list(range(1, steps + 1)), name
    for name in ("gram", "high_res", "distill"):
        bytes_of = {key: value for key, value in by_name[name].data.metrics.items() if key.startswith("io/")}
        assert bytes_of["io/driver_checkpoint_bytes_written"] == 0, name
        assert bytes_of["io/worker_checkpoint_bytes_read"] > 500_000, name
        assert bytes_of["io/worker_checkpoint_bytes_written"] > 1_000_000, name
    forwards = client.get_metric_history(by_name["distill"].info.run_id, "sharing/teacher_forwards_per_image")
    assert [metric.value for metric in forwards][-1] == 1.0
    for student in ("small-vit-femto", "small-convnext-mini"):
        version = client.get_model_version_by_alias(student, "champion")
        assert "orchestrator.pipeline" in version.tags


def check_artifacts(folder: Path) -> None:
    artifacts = folder / "runs" / "artifacts"
    for artifact in artifacts.iterdir():
        manifest = json.loads((artifact / "manifest.json").read_text())
        files = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
        assert files - {"manifest.json"} == set(manifest["files"])
        assert not [name for name in files if name.endswith((".pt", ".pkl", ".bin"))]
    (pretrain,) = artifacts.glob("pretrain-*")
    meta = json.loads((pretrain / "checkpoint" / "checkpoint.json").read_text())
    assert meta["step"] == 30
    assert meta["num_workers"] == 2
    assert len(list((pretrain / "snapshots").iterdir())) == 3
    (evaluation,) = artifacts.glob("evaluate-*")
    assert (evaluation / "report.html").stat().st_size > 10_000


def check_replan(folder: Path) -> None:
    """A comment and an interval re-run nothing; a changed setting re-runs its stage and what hangs on it."""
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text("# a comment\n" + pipeline.read_text())
    same = ask(folder, "plan", "pipeline.yaml", "elastic.checkpoint_every_s=99")
    assert "0 of 8" in same or "othing to" in same
    changed = ask(folder, "plan", "pipeline.yaml", "stages.align_text.steps=5")
    assert "3 → 5" in changed
    assert "2 of 8 stages to run: align_text, evaluate" in changed or "3 of 8" in changed, changed
