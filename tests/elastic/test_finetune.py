"""Fine-tuning: the same bits at any number of workers, after a stop too, and only what its mode trains moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import orchestrator
from orchestrator.data.index import ImageIndex
from orchestrator.models import build, save_pretrained

from .conftest import Group
from .test_chunks import saved

STEPS = 6
CONFIG: dict[str, Any] = {
    "kind": "finetune", "task": "classification", "steps": STEPS, "batch_size": 14, "block_size": 2, "image_size": 32,
    # High, so that a bit that differs somewhere moves others.
    "optimizer": {"lr": {"peak": 1e-2, "warmup_steps": 1}, "layer_decay": 0.8, "clip_norm": 0.5},
    "validate_every": 3, "split": {"near_duplicate": 1.0},
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "frozen": {"mode": "frozen"},
    "lora": {"mode": "lora", "lora": {"rank": 2, "targets": ["attention", "mlp"]}, "ema": {"peak": 0.6}},
    "full": {"mode": "full", "drop_path": 0.5},
}


@pytest.fixture(scope="module")
def labelled(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index, each picture with bytes of its own and one of three labels."""
    whole, folder = ImageIndex.load(index), tmp_path_factory.mktemp("labelled")
    ImageIndex(
        [
            replace(whole[row], sha256=f"{row:064x}", label="abc"[row % 3], component="balanced")
            for row in range(len(whole))
        ]
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(11)
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": 32})
    return folder


def tune(group: Group, labelled: Path, start: Path, work: Path, world: int, mode: str, **spec: Any) -> Any:
    config = {**CONFIG, **MODES[mode], **spec.pop("config", {})}
    full = {"config": config, "index": str(labelled), "start": str(start), "work": str(work), **spec}
    return group("tune", world, **full)[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_bits_do_not_depend_on_the_number_of_workers(
    group: Group, labelled: Path, start: Path, tmp_path: Path, mode: str
) -> None:
    run = {"labelled": labelled, "start": start, "mode": mode, "exact": True}
    alone = tune(group, work=tmp_path / "alone", world=1, **run)
    theirs = saved(tmp_path / "alone" / f"checkpoints/step-{STEPS:08d}")
    weights = {name.removeprefix("master/") for name in theirs if name.startswith("master/")}
    in_backbone = [name for name in weights if name.startswith("backbone.")]
    assert bool(in_backbone) == (mode != "frozen")
    assert all(".lora_" in name for name in in_backbone) == (mode != "full")
    assert set(alone["held_out"]) == {3, STEPS} or set(alone["held_out"]) == {"3", str(STEPS)}
    for world in (2, 3):
        got = tune(group, work=tmp_path / f"at-{world}", world=world, **run)
        ours = saved(tmp_path / f"at-{world}" / f"checkpoints/step-{STEPS:08d}")
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=f"{world} {name}")
        for step, metrics in alone["held_out"].items():
            for name in ("accuracy", "mean_class_accuracy", "cross_entropy", "loss"):
                assert got["held_out"][step][name] == pytest.approx(metrics[name], rel=1e-12), (world, name)
            # Without smoothing the loss of a split is the mean of its images' cross-entropy.
            assert metrics["loss"] == pytest.approx(metrics["cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_it_goes_on_where_it_stopped_at_another_number_of_workers(
    group: Group, labelled: Path, start: Path, tmp_path: Path, zero_stage: int
) -> None:
    run = {"labelled": labelled, "start": start, "mode": "lora", "config": {"zero_stage": zero_stage}}
    whole = tune(group, work=tmp_path / "whole", world=1, **run)
    stopped = tune(group, work=tmp_path / "cut", world=2, stop_after=2, **run)
    assert not stopped["complete"]
    resumed = tune(group, work=tmp_path / "cut", world=3, **run)
    assert resumed["complete"]
    assert [step for step, _ in resumed["metrics"]] == list(range(3, STEPS + 1))
    losses = {step: metrics["loss"] for step, metrics in whole["metrics"]}
    for step, metrics in [*stopped["metrics"], *resumed["metrics"]]:
        assert metrics["loss"] == pytest.approx(losses[step], rel=1e-4), step
    export = f"exports/step-{STEPS:08d}.safetensors"
    ours, theirs = load_file(tmp_path / "cut" / export), load_file(tmp_path / "whole" / export)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_whole_stage_leaves_a_model_that_predicts(
    group: Group, labelled: Path, start: Path, tmp_path: Path
) -> None:
    """With weights of a folder as `from`, through its own `run`."""
    config = {**CONFIG, **MODES["lora"], "from": str(start), "steps": 4, "validate_every": 1}
    (found,) = group(
        "stage", 1, folder=str(tmp_path / "stage"), config=config, inputs={"index": str(labelled)}
    )
    assert "error" not in found, found
    out = tmp_path / "stage/out"
    scores = json.loads((out / "scores.json").read_text())
    looks = json.loads((out / "validation.json").read_text())
    assert [look["step"] for look in looks] == [1, 2, 3, 4]
    accuracies = [look["metrics"]["accuracy"] for look in looks]
    assert scores["best_step"] == 1 + int(np.argmax(accuracies)), "the first of the best"
    # The folder gives on validation what training saw there, though it is read anew, merged, by other code.
    assert scores["validation"]["accuracy"] == pytest.approx(max(accuracies))
    chosen = looks[scores["best_step"] - 1]["metrics"]
    assert scores["validation"]["cross_entropy"] == pytest.approx(chosen["cross_entropy"], rel=1e-4)
    assert scores["classes"] == ["a", "b", "c"]
    assert sum(scores[name]["images"] for name in ("validation", "test")) + scores["training_images"] == 40
    adapters = 2 * 2 * ((48 + 144) + (48 + 48) + (48 + 192) + (192 + 48))
    assert scores["trained_parameters"] == adapters + scores["head_parameters"]
    assert scores["head_parameters"] == 2 * 48 * 3 + 3
    state = load_file(out / "model/model.safetensors")
    assert state.keys() == load_file(start / "model.safetensors").keys(), "merged: the layers of any backbone"


def scenes(folder: Path, targets: str) -> Path:
    """20 pictures of a bright box on dark ground, with masks (classes 3 and 7, 255 ignored) or depth in millimetres."""
    rng = np.random.default_rng(4)
    for name in ("images", targets):
        (folder / name).mkdir(parents=True)
    for number in range(20):
        top, left = rng.integers(0, 24, 2)
        pixels = rng.integers(0, 60, (48, 56, 3), dtype=np.uint8)
        pixels[top : top + 24, left : left + 24] += 160
        target = np.full((48, 56), 3 if targets == "masks" else 4000, np.uint16)
        target[top : top + 24, left : left + 24] = 7 if targets == "masks" else 1500
        target[:2] = 255 if targets == "masks" else 0
        cv2.imwrite(str(folder / "images" / f"{number:02}.png"), pixels)
        cv2.imwrite(
            str(folder / targets / f"{number:02}.png"),
            target.astype(np.uint8) if targets == "masks" else target,
        )
    return folder


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_maps_are_learnt_from_a_data_set_of_their_own(
    group: Group, start: Path, tmp_path: Path, task: str
) -> None:
    data = scenes(tmp_path / "data", "masks" if task == "segmentation" else "depth")
    split = {"by": "hash", "near_duplicate": 1.0, "seed": 1}
    config = {
        **CONFIG, **MODES["lora"], "split": None, "from": str(start), "steps": 40, "validate_every": 20,
        "task": {"type": task, "data": {"path": str(data), "split": split}, "head": "decoder", "width": 16,
                 "num_doublings": 1},
    }  # fmt: skip
    config = {name: value for name, value in config.items() if value is not None}
    (found,) = group("stage", 1, folder=str(tmp_path / "stage"), config=config, inputs={})
    assert "error" not in found, found
    out = tmp_path / "stage/out"
    scores = json.loads((out / "scores.json").read_text())
    looks = json.loads((out / "validation.json").read_text())
    best = next(look["metrics"] for look in looks if look["step"] == scores["best_step"])
    for name, value in scores["validation"].items():
        if name != "images":
            assert best[name] == pytest.approx(value, rel=1e-3), name
    model = orchestrator.load(out / "model")
    picture = cv2.cvtColor(cv2.imread(str(data / "images/00.png")), cv2.COLOR_BGR2RGB)
    made = model.predict_maps(picture)
    assert made.shape == (1, 32, 32)
    if task == "segmentation":
        assert scores["classes"] == ["3", "7"]
        assert scores["test"]["mean_iou"] > 0.6, "always the ground is 0.35"
        assert made.dtype == np.int64
        assert set(np.unique(made)) <= {0, 1}
    else:
        # Always the mean of the depths is 1.1 m off.
        assert scores["test"]["rmse"] < 0.8
        assert 0 < scores["test"]["delta_1"] <= 1
        assert 0.1 <= made.min() <= made.max() <= 10.0


def test_detection_learns_and_its_model_finds_boxes(group: Group, start: Path, tmp_path: Path) -> None:
    """The bright boxes of the scenes, trained for a minute; what it can become takes longer (docs/finetune.md)."""
    data = scenes(tmp_path / "data", "masks")
    record: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "box"}]}
    for number in range(20):
        mask = cv2.imread(str(data / f"masks/{number:02}.png"), cv2.IMREAD_GRAYSCALE)
        rows, columns = np.nonzero(mask == 7)
        left, top = int(columns.min()), int(rows.min())
        corner = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        record["images"].append({"id": number, "file_name": f"{number:02}.png", "width": 56, "height": 48})
        record["annotations"].append({"image_id": number, "category_id": 4, "bbox": corner})
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    config = {
        **CONFIG, "mode": "full", "from": str(start), "steps": 60, "validate_every": 30, "crop_scale": [0.8, 1.0],
        "optimizer": {"lr": {"peak": 3e-3, "warmup_steps": 10, "shape": "cosine"}, "weight_decay": 1e-4},
        "task": {"type": "detection", "num_queries": 4, "width": 32, "num_layers": 2,
                 "data": {"path": str(data / "images"), "annotations": str(tmp_path / "boxes.json"),
                          "split": {"near_duplicate": 1.0, "seed": 1}}},
    }  # fmt: skip
    del config["split"]
    (found,) = group("stage", 1, folder=str(tmp_path / "stage"), config=config, inputs={})
    assert "error" not in found, found
    scores = json.loads((tmp_path / "stage/out/scores.json").read_text())
    assert scores["classes"] == ["box"]
    assert 0 < scores["test"]["map"] <= scores["test"]["map_50"] <= 1
    losses = [record["metrics"]["last_layer"] for record in found["history"]]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    model = orchestrator.load(tmp_path / "stage/out/model")
    (objects,) = model.predict_boxes(str(data / "images/00.png"), least=0.0)
    assert objects.boxes.shape == (4, 4)
    assert objects.labels == ["box"] * 4
    assert (np.diff(objects.scores) <= 0).all()
