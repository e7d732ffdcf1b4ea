"""A watcher beside a real run: it scores checkpoints while the stage trains, and keeps the best model."""

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
