"""A step is the same step whoever computes it: at any worker count, after any stop, at any ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from .conftest import CONFIG, RunJob

STEPS = CONFIG["steps"]
CLIP_NORM = 5.0
NORMS = ("grad_norm_backbone", "grad_norm_dino_head", "grad_norm_ibot_head")


def exported(work: Path) -> dict[str, np.ndarray[Any, Any]]:
    return load_file(work / "exports" / f"step-{STEPS:08d}.safetensors")


@pytest.fixture
def undisturbed(run_job: RunJob, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    result = run_job(tmp_path / "undisturbed", 2)
    assert result["complete"]
    assert len(set(result["losses"].values())) == STEPS, "a constant loss would prove nothing"
    return result, tmp_path / "undisturbed"


def test_stop_and_go_on_with_any_number_of_workers(
    undisturbed: tuple[dict[str, Any], Path], run_job: RunJob, tmp_path: Path
) -> None:
    whole, whole_work = undisturbed
    stopped = tmp_path / "stopped"
    first = run_job(stopped, 2, stop_after=3)
    assert not first["complete"]
    assert [step for step, _ in first["metrics"]] == [1, 2, 3]
    for world in (2, 1, 3):  # 3 does not divide the 4 blocks: two slots are padding
        work = tmp_path / f"goes-on-{world}"
        shutil.copytree(stopped, work)
        second = run_job(work, world)
        joined = {**first["losses"], **second["losses"]}
        if world == 2:
            assert joined == whole["losses"], "the same count must give the same bits"
            for name, value in exported(whole_work).items():
                np.testing.assert_array_equal(exported(work)[name], value, err_msg=name)
        for step, loss in whole["losses"].items():
            assert joined[step] == pytest.approx(loss, rel=1e-5), (world, step)
        for name, value in exported(whole_work).items():
            np.testing.assert_allclose(
                exported(work)[name], value, rtol=1e-3, atol=1e-5, err_msg=f"{world} {name}"
            )


@pytest.mark.parametrize("world", [1, 2])
def test_stage_1_trains_in_bf16_as_stage_2_does(run_job: RunJob, tmp_path: Path, world: int) -> None:
    """Also after a stop, and with clipping: some norms are above it, others below."""
    optimizer = {**CONFIG["optimizer"], "clip_norm": 0.3}
    config = {"optimizer": optimizer, "frozen_prototype_steps": 0}
    common = {"config": config, "precision": "bf16"}
    stages = {
        zero_stage: run_job(tmp_path / f"zero-{zero_stage}", world, zero_stage=zero_stage, **common)
        for zero_stage in (0, 1, 2, 3)
    }
    assert all(result["complete"] for result in stages.values())
    assert stages[1]["losses"] == stages[2]["losses"]
    norms = [metrics["grad_norm_backbone"] for _, metrics in stages[1]["metrics"]]
    assert max(norms) > 0.3
    for step, loss in stages[3]["losses"].items():
        assert stages[1]["losses"][step] == pytest.approx(loss, rel=1e-2)
        assert stages[0]["losses"][step] == pytest.approx(loss, rel=1e-2)
    assert not run_job(tmp_path / "stopped", world, zero_stage=1, stop_after=3, **common)["complete"]
    rest = run_job(tmp_path / "stopped", world, zero_stage=1, **common)
    assert rest["losses"] == {step: loss for step, loss in stages[1]["losses"].items() if step > 3}
    for name, value in exported(tmp_path / "zero-1").items():
        np.testing.assert_array_equal(exported(tmp_path / "stopped")[name], value, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_exact_weights_do_not_depend_on_who_holds_them(
    run_job: RunJob, tmp_path: Path, world: int, precision: str
) -> None:
    """Replicated or sharded, clipped or not: the same bits of weights, average and moments, through a hand-over."""
    config = {"optimizer": {**CONFIG["optimizer"], "clip_norm": CLIP_NORM}, "frozen_prototype_steps": 1}
    common = {"config": config, "precision": precision, "exact": True}
    sharded = run_job(tmp_path / "sharded", 2, zero_stage=3, **common)
    replicated = run_job(tmp_path / "replicated", world, zero_stage=0, **common)
    norms = {name: [metrics[name] for _, metrics in sharded["metrics"]] for name in NORMS}
    assert any(min(each) < CLIP_NORM for each in norms.values()), "all is clipped: a factor would not show"
    assert any(max(each) > CLIP_NORM for each in norms.values())
    for name, each in norms.items():
        found = [metrics[name] for _, metrics in replicated["metrics"]]
        assert found == pytest.approx(each, rel=1e-12), name
    moved = tmp_path / "moved"
    first = run_job(moved, world, zero_stage=0, stop_after=2, **common)
    second = run_job(moved, 3 - world, zero_stage=3, stop_after=2, **common)
    third = run_job(moved, 3, zero_stage=0, **common)
    assert third["complete"]
    assert sharded["losses"] == replicated["losses"]
    assert sharded["losses"] == {**first["losses"], **second["losses"], **third["losses"]}
    truth = saved(tmp_path / "sharded")
    assert {name.partition("/")[0] for name in truth} == {"master", "ema", "exp_avg", "exp_avg_sq"}
    for work in ("replicated", "moved"):
        found = saved(tmp_path / work)
        assert found.keys() == truth.keys()
        for name, value in truth.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{work} {name}")


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_checkpoint_moves_between_zero_stages(
    undisturbed: tuple[dict[str, Any], Path], run_job: RunJob, tmp_path: Path, zero_stage: int
) -> None:
    whole, _ = undisturbed
    work = tmp_path / "work"
    first = run_job(work, 1, zero_stage=zero_stage, stop_after=3)
    second = run_job(work, 2, zero_stage=3)
    for step, loss in {**first["losses"], **second["losses"]}.items():
        assert loss == pytest.approx(whole["losses"][step], rel=1e-5), step


def test_gram_stage_goes_on_from_pretraining(
    undisturbed: tuple[dict[str, Any], Path], run_job: RunJob, tmp_path: Path
) -> None:
    """The Gram teacher starts from a snapshot, takes the EMA when told, and survives a change of workers."""
    _, pretrained = undisturbed
    gram = {
        "config": {
            **dict.fromkeys(("model", "drop_path", "heads")),
            "kind": "gram_anchor",
            "gram": {"first_update": 3, "weight": {"peak": 2.0}},
        },
        "start_from": str(pretrained / "checkpoints" / f"step-{STEPS:08d}"),
        "gram": str(pretrained / "exports" / f"step-{STEPS:08d}.safetensors"),
    }
    whole = run_job(tmp_path / "gram", 2, **gram)
    metrics = {step: metrics["gram"] for step, metrics in whole["metrics"]}
    # The EMA it starts with is its own anchor, so the first loss is the student's distance to its EMA only.
    assert all(value >= 0 for value in metrics.values())
    work = tmp_path / "moved"
    first = run_job(work, 2, stop_after=4, **gram)
    second = run_job(work, 1, **gram)
    for step, loss in {**first["losses"], **second["losses"]}.items():
        assert loss == pytest.approx(whole["losses"][step], rel=1e-5), step


def test_prototypes_are_frozen_at_first(run_job: RunJob, tmp_path: Path) -> None:
    run_job(tmp_path, 1, stop_after=2)
    early = load_master(tmp_path / "checkpoints" / "step-00000002")
    run_job(tmp_path, 1)
    late = load_master(tmp_path / "checkpoints" / f"step-{STEPS:08d}")
    name = "master/dino_head.prototypes.weight"
    start = load_file_init()
    np.testing.assert_array_equal(early[name], start[name])
    assert not np.array_equal(late[name], start[name])
    assert not np.array_equal(early["master/dino_head.mlp.0.weight"], start["master/dino_head.mlp.0.weight"])


def saved(work: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of the last checkpoint, whole: its workers' parts one after another."""
    folder = work / "checkpoints" / f"step-{STEPS:08d}"
    parts = [load_file(file) for file in sorted(folder.rglob("shard-*.safetensors"))]
    names = {name for part in parts for name in part}
    return {name: np.concatenate([part[name] for part in parts if name in part]) for name in names}


def load_master(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    meta = json.loads((folder / "checkpoint.json").read_text())
    assert meta["num_workers"] == 1
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def load_file_init() -> dict[str, np.ndarray[Any, Any]]:
    """The weights every job of these tests starts with (seed 0)."""
    import torch

    from orchestrator.stages.common.config import Heads
    from orchestrator.stages.common.nets import HeadedBackbone

    torch.manual_seed(0)
    net = HeadedBackbone(CONFIG["model"], CONFIG["drop_path"], Heads.model_validate(CONFIG["heads"]))
    return {f"master/{name}": value.detach().flatten().numpy() for name, value in net.named_parameters()}
