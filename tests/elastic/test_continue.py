"""Training that starts from trained weights, or goes on from an earlier run: what moves, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from orchestrator.models import build
from orchestrator.models.convert import to_layout
from orchestrator.storage.local import LocalStore
from orchestrator.training.checkpoint.storage import CheckpointStorage, is_newer

from .conftest import HEADS, Group
from .test_chunks import saved

STEPS = 4
CONFIG: dict[str, Any] = {
    "kind": "pretrain", "heads": HEADS, "steps": STEPS, "batch_size": 8, "block_size": 4, "drop_path": 0.2,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    # Decay, clipping and layer-wise rates: frozen means all of them.
    "optimizer": {"lr": {"peak": 1e-2}, "weight_decay": 0.5, "layer_decay": 0.8}, "ema": {"peak": 0.5},
}  # fmt: skip
Weights = dict[str, np.ndarray[Any, Any]]
RunStage = Callable[..., dict[str, Any]]


@pytest.fixture
def run_stage(group: Group, index: Path, tmp_path: Path) -> RunStage:
    """Runs a stage into a folder with one worker."""

    photos = index

    def run(
        folder: str,
        config: dict[str, Any],
        *,
        backbone: Path | None = None,
        index: Path = photos,
        **spec: Any,
    ) -> Any:
        inputs = {"index": str(index)} | ({"backbone": str(backbone)} if backbone else {})
        inputs |= spec.pop("more_inputs", {})
        merged = {name: value for name, value in {**CONFIG, **config}.items() if value is not None}
        (found,) = group(
            spec.pop("do", "stage"), 1, folder=str(tmp_path / folder), config=merged, inputs=inputs, **spec
        )
        return found

    return run


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    tower = build("vit_femto")
    state = to_layout(tower.state_dict(), tower.config, "hub")
    path = tmp_path / "published.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in state.items()}}, path)
    return path


def published() -> Weights:
    torch.manual_seed(11)
    return {name: value.numpy() for name, value in build("vit_femto").state_dict().items()}


def model(folder: Path) -> Weights:
    return load_file(folder / "out/model/model.safetensors")


def state(folder: Path, steps: int = STEPS) -> Weights:
    return saved(folder / "out/checkpoint")


def assert_frozen(found: Weights, kind: str) -> None:
    for name, value in published().items():
        np.testing.assert_array_equal(found[f"{kind}/backbone.{name}"], value.flatten(), err_msg=name)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_frozen_backbone_is_the_published_one_to_the_bit(
    run_stage: RunStage, hub: Path, tmp_path: Path, zero_stage: int
) -> None:
    config = {"from": str(hub), "freeze_backbone_steps": STEPS, "zero_stage": zero_stage}
    run_stage("frozen", config)
    assert model(tmp_path / "frozen").keys() == published().keys()
    for name, value in model(tmp_path / "frozen").items():
        np.testing.assert_array_equal(value, published()[name], err_msg=name)
    found = state(tmp_path / "frozen")
    assert_frozen(found, "master")
    assert_frozen(found, "ema")
    heads = [name for name in found if name.startswith(("master/dino_head", "master/ibot_head"))]
    assert heads
    for name in heads:
        assert not np.array_equal(found[name], found[name.replace("master/", "ema/")]), (
            f"{name} did not learn"
        )

    # One step more than frozen ones: all of it moves.
    run_stage("thawed", {**config, "freeze_backbone_steps": STEPS - 1})
    thawed = state(tmp_path / "thawed")
    for name, value in published().items():
        assert not np.array_equal(thawed[f"master/backbone.{name}"], value.flatten()), name


def test_the_first_loss_is_of_the_weights_and_not_of_random_ones(
    run_stage: RunStage, hub: Path, tmp_path: Path
) -> None:
    """Health of the EMA in step 1 is that of the published backbone, whatever the heads are."""
    first = run_stage("first", {"from": str(hub), "steps": 1})["history"][0]["metrics"]
    other = run_stage("other", {"model": "vit_femto", "steps": 1})["history"][0]["metrics"]
    again = run_stage("again", {"from": str(hub), "steps": 1, "model": "vit_femto"})["history"][0]["metrics"]
    assert first["patch_locality"] == again["patch_locality"]
    assert first["patch_locality"] != other["patch_locality"]
    recipe = json.loads((tmp_path / "first/out/recipe.json").read_text())
    assert (recipe["model"], recipe["drop_path"]) == ("vit_femto", 0.2)


def test_pretraining_is_anchored_to_its_start(run_stage: RunStage, hub: Path, tmp_path: Path) -> None:
    # Without masks and all that is drawn, student and Gram teacher are one network at first.
    plain = {"mask_probability": 0.0, "drop_path": 0.0, "model_overrides": {"rope_rescale": None}}
    found = run_stage("anchored", {"from": str(hub), "gram": {"weight": {"peak": 3.0}}, **plain})
    terms = [record["metrics"]["gram"] for record in found["history"]]
    assert terms[0] == pytest.approx(0.0, abs=1e-9)
    assert terms[1] > 1e-4
    copy = state(tmp_path / "anchored")
    for name, value in published().items():
        np.testing.assert_array_equal(copy[f"copies.gram/{name}"], value.flatten(), err_msg=name)


@pytest.mark.parametrize("kind", ["gram_anchor", "high_res"])
def test_a_refinement_starts_from_weights_with_new_heads(
    run_stage: RunStage, hub: Path, tmp_path: Path, kind: str
) -> None:
    sizes = {"resolutions": [{"global_size": 48, "local_size": 16, "p": 1.0}]} if kind == "high_res" else {}
    config = {"kind": kind, "from": str(hub), "freeze_backbone_steps": STEPS, **sizes}
    found = run_stage("refined", config)
    assert_frozen(state(tmp_path / "refined"), "ema")
    assert all("gram" in record["metrics"] for record in found["history"])
    assert (
        json.loads((tmp_path / "refined/out/recipe.json").read_text())["heads"]["hidden"] == HEADS["hidden"]
    )


def test_pretraining_goes_on_from_pretraining(run_stage: RunStage, hub: Path, tmp_path: Path) -> None:
    """With heads, moments and average, on samples of its own."""
    first = run_stage("first", {"from": str(hub), "snapshot_every": 2})
    shape = dict.fromkeys(("heads", "drop_path"))
    # Without any rate it ends with the very weights that it begins with; the average is the one of the first stage.
    still = {"optimizer": {"lr": {"peak": 0.0}}, "ema": {"peak": 1.0}}
    second = run_stage("second", {**shape, **still}, backbone=tmp_path / "first/out")
    for name, value in state(tmp_path / "first").items():
        if name.startswith(("master/", "ema/")):
            np.testing.assert_array_equal(state(tmp_path / "second")[name], value, err_msg=name)
    orders = [[record["metrics"]["sample_order"] for record in found["history"]] for found in (first, second)]
    assert set(orders[0]).isdisjoint(orders[1])
    lineage = json.loads((tmp_path / "second/out/lineage.json").read_text())
    assert [snapshot["updates"] for snapshot in lineage["snapshots"]] == [2, STEPS, 2 * STEPS]
    moved = run_stage("third", shape, backbone=tmp_path / "second/out")
    assert set(orders[1]).isdisjoint(record["metrics"]["sample_order"] for record in moved["history"])


def test_more_steps_go_on_where_fewer_ended(run_stage: RunStage, hub: Path, tmp_path: Path) -> None:
    """The longer run is the one that was never shorter: weights, moments, metrics and snapshots."""
    config = {"from": str(hub), "freeze_backbone_steps": 1, "snapshot_every": 2, "model": "vit_femto"}
    run_stage("shorter", config)
    longer = {**config, "steps": 2 * STEPS}
    whole = run_stage("whole", longer)
    grown = run_stage("grown", longer, shorter=str(tmp_path / "shorter/out"))
    for name, value in state(tmp_path / "whole").items():
        np.testing.assert_array_equal(state(tmp_path / "grown")[name], value, err_msg=name)
    curves = [
        {record["step"]: record["metrics"]["loss"] for record in found["history"]} for found in (whole, grown)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2 * STEPS
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "out/snapshots").iterdir()}
        for name in ("whole", "grown")
    ]
    assert files[0].keys() == files[1].keys()
    lineages = [json.loads((tmp_path / name / "out/lineage.json").read_text()) for name in ("whole", "grown")]
    assert lineages[0] == lineages[1]
    # In a remote store, a worker on another machine finds the checkpoint, and its group is a newer one.
    store = LocalStore(tmp_path / "store")
    CheckpointStorage(tmp_path / "driver", store, "job/checkpoints/").adopt(
        tmp_path / "shorter/out/checkpoint"
    )
    elsewhere = CheckpointStorage(tmp_path / "worker", store, "job/checkpoints/")
    assert elsewhere.committed() == [STEPS]
    assert is_newer(elsewhere.acquire(), elsewhere.whole(STEPS).token)
    # A snapshot that the longer run would not have kept is not kept.
    run_stage("sparse", {**longer, "snapshot_every": 0}, shorter=str(tmp_path / "shorter/out"))
    assert [path.name for path in (tmp_path / "sparse/out/snapshots").iterdir()] == [
        f"step-{2 * STEPS:08d}.safetensors"
    ]


@pytest.mark.parametrize("objective", ["heads", "features"])
def test_a_student_with_more_steps_goes_on_where_fewer_ended(
    run_stage: RunStage, hub: Path, tmp_path: Path, objective: str
) -> None:
    run_stage("teacher", {"from": str(hub), "steps": 1, "model": "vit_femto"})
    student = {"model": "convnext_mini", "drop_path": 0.2}
    features = {"features": {"whiten": True, "whiten_images": 8}} if objective == "features" else {}
    distill = {
        "kind": "distill", "steps": STEPS, "students": {"small": student}, "ema": {"peak": 0.9},
        "optimizer": {"lr": {"peak": 1e-2, "warmup_steps": 2}}, **dict.fromkeys(("heads", "drop_path")), **features,
    }  # fmt: skip
    common = {"backbone": None, "do": "student"}

    def train(folder: str, steps: int, **spec: Any) -> Any:
        inputs = {"teacher": str(tmp_path / "teacher/out")}
        return run_stage(folder, {**distill, "steps": steps}, more_inputs=inputs, **common, **spec)

    shorter = train("shorter", STEPS)
    whole = train("whole", 2 * STEPS)
    grown = train("grown", 2 * STEPS, shorter=str(tmp_path / "shorter/out"), found=shorter["made"])
    assert (whole["begun"], grown["begun"]) == (0, STEPS)
    ours, theirs = (saved(Path(found["made"]) / "checkpoint") for found in (grown, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    model = "model/model.safetensors"
    assert (Path(grown["made"]) / model).read_bytes() == (Path(whole["made"]) / model).read_bytes()
    curves = [
        {record["step"]: record["metrics"]["loss"] for record in found["history"]} for found in (whole, grown)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2 * STEPS
    # A schedule that knows the last step begins anew.
    tied = {"students": {"small": {**student, "ema": {"peak": 0.9, "end": 1.0, "shape": "cosine"}}}}
    distill |= tied
    over = train("over", 2 * STEPS, shorter=str(tmp_path / "shorter/out"), found=shorter["made"])
    assert over["begun"] == 0


def test_it_stops_when_dense_features_decay(run_stage: RunStage, hub: Path, tmp_path: Path) -> None:
    wild = {"from": str(hub), "optimizer": {"lr": {"peak": 0.3}}, "ema": {"peak": 0.0}, "steps": 12}
    limits = {"window": 2, "cosine_rise": 0.02, "locality_drop": 0.02}
    found = run_stage("stopped", {**wild, "stop_if": limits})
    assert "dense features are worse than at the start" in found["error"]
    assert "lower optimizer.lr.peak" in found["error"]
    steps = len(found["history"])
    assert 2 < steps < 12
    # Larger amounts are no other result: the run is the same one, to its end.
    calm = run_stage("calm", {**wild, "stop_if": {"window": 2, "cosine_rise": 2.0, "locality_drop": 2.0}})
    assert len(calm["history"]) == 12
