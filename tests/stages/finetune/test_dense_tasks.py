"""Segmentation, depth and detection: their metrics, and mistakes in their data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.metrics import (
    jaccard_score,
    mean_squared_error,
)

from orchestrator.data.index import ImageIndex
from orchestrator.errors import UserError
from orchestrator.evaluation.metrics.segmentation import iou_parts, mean_iou
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.finetune.dense_goals import DepthGoal, SegmentationGoal
from orchestrator.stages.finetune.pictures import indexed
from orchestrator.stages.finetune.run import labelled_rows

from .finetuning import config, context


def test_segmentation_is_measured_as_scikit_learn_and_evaluate_do() -> None:
    rng = np.random.default_rng(0)
    logits, true = rng.normal(0, 1, (5, 4, 6, 7)), rng.integers(-1, 3, (5, 6, 7))
    weights = np.array([1, 1, 0, 1, 1], np.float32)  # the third only pads
    goal, sums = SegmentationGoal(4, 16, 0), torch.zeros(12, dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 5)):
        tensors = {"classes": torch.from_numpy(true[rows]), "weights": torch.from_numpy(weights[rows])}
        sums = sums + goal.sums(torch.from_numpy(logits[rows]), tensors)
    there = (true >= 0) & (weights > 0)[:, None, None]
    guess = logits.argmax(axis=1)
    metrics = goal.metrics(sums)
    wanted = jaccard_score(true[there], guess[there], average="macro")
    assert metrics["mean_iou"] == pytest.approx(wanted)
    assert metrics["pixel_accuracy"] == pytest.approx((true[there] == guess[there]).mean())
    parts = iou_parts(np.where(there, guess, 0), np.where(there, true, -1), 4)
    assert metrics["mean_iou"] == pytest.approx(float(mean_iou(parts[None])[0]))


def test_depth_is_measured_by_the_formulas() -> None:
    rng = np.random.default_rng(0)
    guess, true = rng.uniform(1, 9, (4, 5, 6)), rng.uniform(1, 9, (4, 5, 6))
    true[0, :2] = 0
    weights = np.array([1, 1, 1, 0], np.float32)
    goal, sums = DepthGoal(0.5, 0.1, 10.0, None, 16, 0), torch.zeros(4, dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        tensors = {"depth": torch.from_numpy(true[rows]), "weights": torch.from_numpy(weights[rows])}
        sums = sums + goal.sums(torch.from_numpy(np.log(guess[rows])), tensors)
    there = (true > 0) & (weights > 0)[:, None, None]
    g, t = guess[there], true[there]
    assert goal.metrics(sums) == pytest.approx(
        {
            "rmse": np.sqrt(mean_squared_error(t, g)),
            "delta_1": (np.maximum(g / t, t / g) < 1.25).mean(),
            "relative_error": (np.abs(g - t) / t).mean(),
        }
    )


def masks(folder: Path, values: Any = lambda number: number % 2, size: tuple[int, int] = (20, 24)) -> Path:
    """12 pictures of noise and masks of one value and, in a corner, 5."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        cv2.imwrite(str(folder / f"images/{number}.png"), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        mask = np.full(size, values(number), np.uint8)
        mask[:4, :4] = 5
        cv2.imwrite(str(folder / f"masks/{number}.png"), mask)
    return folder


def dense(path: Path, **more: Any) -> Finetune:
    split = {"by": "hash", "near_duplicate": 1.0}
    return config(task={"type": "segmentation", "data": {"path": str(path), "split": split, **more}})


def test_mistakes_of_a_data_set_are_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 10x8 pixels, and its picture .* 24x20"):
        dense(masks(tmp_path / "small", size=(8, 10))).check()
    turned = masks(tmp_path / "turned")
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture is seen on its side, its mask is not
    for picture in (turned / "images").iterdir():
        with Image.open(picture) as opened:
            opened.save(picture, exif=exif)
    with pytest.raises(UserError, match=r"has 24x20 pixels, and its picture .* 20x24"):
        dense(turned).check()

    def said(stage: Finetune) -> str:
        with pytest.raises(UserError) as caught, indexed(stage, context(tmp_path, tmp_path)) as found:
            labelled_rows(stage, context(tmp_path, tmp_path), ImageIndex.load(found.folder))
        return caught.value.what

    one = masks(tmp_path / "one", lambda number: 5)
    assert said(dense(one)) == "the masks of the training split have only the class 5"
    assert said(dense(one, ignore=5)) == "no pixel of the masks of the training split counts"
    other = masks(tmp_path / "other", lambda number: number)
    assert "have classes that those of train lack" in said(dense(other))
    gone = dense(tmp_path / "gone")
    assert gone.files()["task.data.path"] == (tmp_path / "gone/images",), "which plan tells as missing"
    with pytest.raises((ValidationError, UserError), match="has a data set of its own"):
        config(task={"type": "segmentation", "data": {"path": "x"}}, split={"seed": 1})
    with pytest.raises((ValidationError, UserError), match="nearest 20 is not below max_depth 10"):
        config(task={"type": "depth", "data": {"path": "x"}, "nearest": 20})


def test_depth_of_no_pixel_has_no_figures_and_no_traceback() -> None:
    metrics = DepthGoal(0.5, 0.1, 10.0, None, 16, 0).metrics(torch.zeros(4, dtype=torch.float64))
    assert set(metrics) == {"rmse", "delta_1", "relative_error"}
    assert all(np.isnan(value) for value in metrics.values())


def test_more_objects_than_queries_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"id": number, "file_name": f"{number}.png", "width": 24, "height": 20} for number in range(12)]
    boxes = [{"image_id": each["id"], "category_id": 1, "bbox": [2, 2, 9, 9]} for each in images]
    record = {
        "images": images,
        "annotations": [*boxes, boxes[3], boxes[3]],
        "categories": [{"id": 1, "name": "dog"}],
    }
    masks(tmp_path / "data")
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    stage = config(
        task={"type": "detection", "num_queries": 2, "data": {"path": str(tmp_path / "data/images"),
              "annotations": str(tmp_path / "boxes.json"), "split": {"by": "hash", "near_duplicate": 1.0}}}
    )  # fmt: skip
    with caplog.at_level("WARNING"), indexed(stage, context(tmp_path, tmp_path)) as found:
        labelled_rows(stage, context(tmp_path, tmp_path), ImageIndex.load(found.folder))
    assert "1 of 12 pictures have more than 2 objects, up to 3" in caplog.text


def test_a_category_with_the_name_of_another_is_a_mistake(tmp_path: Path) -> None:
    """Also if no box has it: classes are known by their names alone, and boxes would be taken for the other's."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 24, "height": 20} for number in range(12)]
    boxes = [{"image_id": each["id"], "category_id": 1, "bbox": [2, 2, 9, 9]} for each in images]
    names = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]
    masks(tmp_path / "data")
    record = {"images": images, "annotations": boxes, "categories": names}
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    stage = config(
        task={"type": "detection", "data": {"path": str(tmp_path / "data/images"),
              "annotations": str(tmp_path / "boxes.json"), "split": {"by": "hash", "near_duplicate": 1.0}}}
    )  # fmt: skip
    told = pytest.raises(UserError, match="two categories are called 'dog'")
    with told, indexed(stage, context(tmp_path, tmp_path)) as found:
        labelled_rows(stage, context(tmp_path, tmp_path), ImageIndex.load(found.folder))


def test_a_task_with_a_data_set_of_its_own_takes_no_index(tmp_path: Path) -> None:
    assert [one.role for one in dense(tmp_path).wants()] == ["backbone"]
    assert [one.role for one in config().wants()] == ["index", "backbone"]
    stage = dense(masks(tmp_path / "data"))
    assert len(stage.files()["task.data.path"]) == 24, "pictures and masks are part of the key"
