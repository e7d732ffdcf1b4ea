"""Gram anchoring that starts when dense features decay: decided alike by all workers, and not forgotten by a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.stages.ssl.anchor import DenseHealthMonitor
from orchestrator.stages.ssl.gram import DenseHealth

from .conftest import RECIPE, RunJob
from .test_chunks import saved

STEPS = 10
# Cosine and locality by step, in windows of two: good, best, a little worse, decayed; after that they do not matter.
HEALTH = [
    (0.30, 0.40), (0.30, 0.40), (0.15, 0.50), (0.25, 0.50), (0.40, 0.45),
    (0.20, 0.45), (0.30, 0.30), (0.36, 0.30), (0.90, 0.00), (0.90, 0.00),
]  # fmt: skip
BEST, STARTED = 4, 8
CONFIG = {
    **dict.fromkeys(("model", "drop_path", "heads")),
    "kind": "gram_anchor",
    "steps": STEPS,
    "frozen_prototype_steps": 0,
    "gram": {
        "trigger": {"on": "dense_health", "window": 2, "cosine_rise": 0.12, "locality_drop": 0.15},
        "weight": {"peak": 2.0, "warmup_steps": 1},
    },
}


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """A snapshot to begin with that is nothing like what is trained."""
    rng = np.random.default_rng(0)
    snapshot = tmp_path / "anchor.safetensors"
    save_file(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in backbone_shapes().items()},
        snapshot,
    )
    return {
        "config": CONFIG, "health": HEALTH, "gram": str(snapshot), "export_steps": list(range(1, STEPS)),
    }  # fmt: skip


def backbone_shapes() -> dict[str, tuple[int, ...]]:
    from orchestrator.models import build

    parameters = build(str(RECIPE["model"])).named_parameters()
    return {f"backbone.{name}": tuple(value.shape) for name, value in parameters}


def last(work: Path) -> Path:
    return work / "checkpoints" / f"step-{STEPS:08d}"


def watched(steps: int) -> dict[str, float]:
    """What a watch knows after some steps, without any training."""
    state: dict[str, float] = {}
    watch = DenseHealthMonitor(DenseHealth.model_validate(CONFIG["gram"]["trigger"]), state, None)
    for done in range(1, steps + 1):
        cosine, locality = HEALTH[done - 1]
        watch.update(done, {"cls_patch_cosine": cosine, "patch_locality": locality})
    return state


@pytest.mark.long
def test_it_starts_after_the_decay_with_the_best_ema(
    run_job: RunJob, job: dict[str, Any], tmp_path: Path
) -> None:
    whole = run_job(tmp_path / "whole", 1, **job)
    metrics = dict(whole["metrics"])
    anchored = [step for step in metrics if "gram" in metrics[step]]
    assert anchored == [STARTED + 1, STARTED + 2]
    assert metrics[STARTED + 1]["gram"] == 0, "its weight counts from when it starts"
    assert metrics[STARTED + 2]["gram"] > 0
    copy = {
        name.removeprefix("copies.gram/"): value for name, value in saved(last(tmp_path / "whole")).items()
    }
    exports = {
        step: load_file(tmp_path / "whole/exports" / f"step-{step:08d}.safetensors")
        for step in range(1, STEPS)
    }
    for name, value in exports[BEST].items():
        if name.startswith("backbone."):
            np.testing.assert_array_equal(copy[name.removeprefix("backbone.")], value.flatten(), err_msg=name)
    moved = "backbone.patch_embed.weight"
    assert not np.array_equal(exports[BEST][moved], exports[BEST + 1][moved])

    # Killed, most often in the middle of a window, and gone on with by two workers. Which checkpoint is the newest one
    # then depends on how fast the disk was.
    killed = tmp_path / "killed"
    run_job(killed, 1, **job, die_at=6, checkpoint_every_s=1e-9)
    newest = json.loads(max(killed.glob("checkpoints/*/checkpoint.json")).read_text())
    assert newest["state"] == pytest.approx(watched(newest["step"]), rel=1e-6)
    rest = run_job(killed, 2, **job)
    for step, again in rest["metrics"]:
        assert again.keys() >= metrics[step].keys() - {"step_seconds", "data_wait_seconds"}
        assert ("gram" in again) == ("gram" in metrics[step])
        assert again["loss"] == pytest.approx(metrics[step]["loss"], rel=1e-5), step
    ours, theirs = saved(last(killed)), saved(last(tmp_path / "whole"))
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= 1e-4 * np.linalg.norm(value) + 1e-7, name
    states = [
        json.loads((last(work) / "checkpoint.json").read_text())["state"]
        for work in (killed, tmp_path / "whole")
    ]
    assert states[0] == pytest.approx(states[1], rel=1e-6)
    assert states[0]["gram_started"] == STARTED

    # A stage that goes on from there has its own watch to keep.
    calm = {"health": [(0.3, 0.4)] * 3, "config": {**CONFIG, "steps": 3}, "export_steps": []}
    second = run_job(tmp_path / "second", 1, **{**job, **calm}, start_from=str(last(tmp_path / "whole")))
    assert len(second["metrics"]) == 3
    assert not any("gram" in metrics for _, metrics in second["metrics"])
