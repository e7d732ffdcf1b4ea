"""A watcher beside a real run: it scores checkpoints while stages train, and keeps and registers the best models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from PIL import Image

import orchestrator

STEPS = 150
PIPELINE = {
    "name": "watched",
    "elastic": {"workers": 1, "checkpoint_every_s": 0.2, "keep_checkpoints": 200},
    "data": {"photos": {"path": "photos", "labels": "folders"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 2},
        "pretrain": {
            "kind": "pretrain", "needs": "curate", "model": "vit_femto", "steps": STEPS, "batch_size": 8,
            "block_size": 8, "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
            "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 2}},
        },
        "distill": {
            "kind": "distill", "needs": ["curate", "pretrain"], "steps": STEPS, "batch_size": 8, "block_size": 8,
            "crops": {"global_size": 32, "local_size": 16, "num_local": 2}, "optimizer": {"lr": {"peak": 1e-3}},
            "students": {"small": {"model": "vit_femto"}},
        },
        "tune": {
            "kind": "finetune", "needs": ["curate", "distill"], "task": "classification", "mode": "lora",
            "steps": STEPS, "batch_size": 4, "block_size": 4, "validate_every": 25,
            "optimizer": {"lr": {"peak": 1e-3}},
            "split": {"validation_share": 0.25, "test_share": 0.25, "near_duplicate": 1},
        },
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_are_scored_while_the_stage_trains(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("red", "green"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
            pixels[..., label == "green"] += 120
            Image.fromarray(pixels).save(tmp_path / f"photos/{label}/{number}.png")
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE))
    program = [sys.executable, "-m", "orchestrator"]
    # Once the photos are curated, and somebody runs the pipeline, a watcher may begin before the first step.
    subprocess.run([*program, "run", "pipeline.yaml", "--until", "curate"], cwd=tmp_path, check=True)
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen([*program, "run", "pipeline.yaml"], cwd=tmp_path, stdout=log, stderr=log)
        command = [*program, "watch", "pipeline.yaml", "pretrain", "--every", "0.2", "--keep", "best"]
        while driver.poll() is None and "starting Ray" not in (tmp_path / "log").read_text():
            time.sleep(0.1)
        watched = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        others = {
            stage: subprocess.run(
                [
                    *program, "watch", "pipeline.yaml", stage, "--every", "0.2",
                    "--keep", f"of-{stage}", "--register", f"watched-{stage}",
                ],
                cwd=tmp_path, capture_output=True, text=True, check=False,
            )
            for stage in ("distill", "tune")
        }  # fmt: skip
        assert driver.wait(timeout=600) == 0, (tmp_path / "log").read_text()
    assert watched.returncode == 0, watched.stdout + watched.stderr
    steps = [int(step) for step in re.findall(r"^pretrain, step (\d+): knn/accuracy", watched.stdout, re.M)]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS, "the finished stage is scored, too"
    assert len(steps) > 1, "and a checkpoint before it"
    said = re.search(r"the best of (\d+) checkpoints is step (\d+), knn/accuracy ([\d.]+)", watched.stdout)
    assert said is not None
    assert int(said[1]) == len(steps)
    record = json.loads((tmp_path / "best/watch.json").read_text())
    assert record["step"] == int(said[2])
    assert f"{record['figures']['knn/accuracy']['value']:.3f}" == said[3]
    assert orchestrator.load(tmp_path / "best").features(tmp_path / "photos/red/0.png").cls.shape == (1, 48)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'runs/mlflow.db'}")
    (run,) = mlflow.search_runs(
        search_all_experiments=True,
        filter_string="tags.`mlflow.runName` = 'watch pretrain'",
        output_format="list",
    )
    assert run.data.params["best_step"] == said[2]
    assert run.data.metrics["watch/best_step"] == int(said[2])
    for stage, name, figure in (
        ("distill", "distill/small", "knn/accuracy"),
        ("tune", "tune", "validation/accuracy"),
    ):
        ended = others[stage]
        assert ended.returncode == 0, ended.stdout + ended.stderr
        scored = re.findall(rf"^{name}, step (\d+): {figure}", ended.stdout, re.M)
        # A fine-tuning this short may be done before its watcher has begun.
        assert len(scored) > (stage == "distill"), "checkpoints of it were scored while it trained"
        record = json.loads((tmp_path / f"of-{stage}/watch.json").read_text())
        pulled = orchestrator.load(
            f"watched-{stage}@best-so-far", tracking=f"sqlite:///{tmp_path / 'runs/mlflow.db'}"
        )
        kept = orchestrator.load(tmp_path / f"of-{stage}")
        picture = tmp_path / "photos/red/0.png"
        np.testing.assert_array_equal(pulled.features(picture).cls, kept.features(picture).cls)
        assert f"is step {record['step']}, {figure}" in ended.stdout
    scores = json.loads(next((tmp_path / "runs/artifacts").glob("finetune-*/scores.json")).read_text())
    best = float(re.findall(r"validation/accuracy ([\d.]+)$", others["tune"].stdout, re.M)[-1])
    assert best >= round(scores["validation"]["accuracy"], 3), "the stage's own choice was scored, too"
