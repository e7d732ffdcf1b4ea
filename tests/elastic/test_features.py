"""Students of headless teachers under the real loop: the same training at any worker count, both architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from orchestrator.models import build, save_pretrained
from orchestrator.training.export import load_export

from .conftest import CONFIG, RunJob

STEPS = 3


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    """Two teachers of unlike grids (4 x 4 and 3 x 3 cells), weights and sizes, whitened; locals take part."""
    torch.manual_seed(5)
    for name in ("vit_femto", "convnext_mini"):
        save_pretrained(tmp_path / name, build(name).state_dict(), name)
    return {
        "config": {
            **dict.fromkeys(("model", "drop_path", "heads", "frozen_prototype_steps", "koleo_views")),
            "kind": "distill",
            "steps": STEPS,
            "ema": {"peak": 0.9},
        },
        "features": {
            "teachers": {
                "a": {"from": str(tmp_path / "vit_femto")},
                "b": {"from": str(tmp_path / "convnext_mini"), "size": 48, "weight": 0.5},
            },
            "whiten": True,
            "whiten_images": 16,
            "local_weight": 0.5,
        },
        "cache": tmp_path / "prepared",
    }


@pytest.mark.parametrize("model", ["vit_femto", "convnext_mini"])
def test_one_worker_and_two_train_the_same_student(
    model: str, spec: dict[str, Any], run_job: RunJob, tmp_path: Path
) -> None:
    spec["config"]["students"] = {"small": {"model": model, "drop_path": 0.3}}
    results, weights = [], []
    for world in (1, 2):
        work = tmp_path / f"{world}-workers"
        results.append(run_job(work, world, **spec))
        weights.append(load_file(work / "exports" / f"step-{STEPS:08d}.safetensors"))
    alone, both = results
    assert alone["complete"]
    assert {f"{name}_{term}" for name in "ab" for term in ("cls", "patches", "local")} <= alone["metrics"][0][
        1
    ].keys()
    for step, loss in alone["losses"].items():
        assert both["losses"][step] == pytest.approx(loss, rel=1e-5), step
    assert alone["losses"][STEPS] < alone["losses"][1], "it learns"
    heads = {name.split(".")[0] for name in weights[0]}
    assert heads == {"backbone", "cls_heads", "patch_heads"}
    exported = load_export(tmp_path / "2-workers" / "exports" / f"step-{STEPS:08d}.safetensors", "backbone.")
    build(model).load_state_dict(dict(exported))
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_student_goes_on_from_its_checkpoint(spec: dict[str, Any], run_job: RunJob, tmp_path: Path) -> None:
    """At another worker count and ZeRO stage; what the teachers say of a step does not depend on what came before."""
    spec["config"]["students"] = {"small": {"model": "vit_femto"}}
    whole = run_job(tmp_path / "whole", 1, **spec)
    first = run_job(tmp_path / "parts", 1, stop_after=2, **spec)
    second = run_job(tmp_path / "parts", 2, zero_stage=1, **spec)
    joined = {**first["losses"], **second["losses"]}
    assert joined.keys() == whole["losses"].keys()
    for step, loss in whole["losses"].items():
        assert joined[step] == pytest.approx(loss, rel=1e-5), step


assert CONFIG["block_size"] * 4 == CONFIG["batch_size"], "two workers have two blocks each"
