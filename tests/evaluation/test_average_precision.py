"""Average precision by hand, and as pycocotools computes it where it is installed."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestrator.evaluation.metrics.average_precision import (
    ImageBoxes,
    Precisions,
    average_precision,
    overlaps,
)


def image(
    found: list[list[float]], scores: list[float], classes: list[int], true: Any, of: list[int]
) -> ImageBoxes:
    return ImageBoxes(
        np.array(found, float).reshape(-1, 4),
        np.array(scores, float),
        np.array(classes, np.int64),
        np.array(true, float).reshape(-1, 4),
        np.array(of, np.int64),
    )


def test_by_hand() -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    perfect = image([box], [0.9], [0], [box], [0])
    assert average_precision([perfect]) == {"map": 1.0, "map_50": 1.0}
    # An overlap of 0.8 is right at 0.5, 0.55, … 0.8.
    near = image([[0, 0, 10, 8]], [0.9], [0], [box], [0])
    assert average_precision([near]) == pytest.approx({"map": 0.7, "map_50": 1.0})
    # The surest is wrong: precision is 1/2 at every recall.
    second = image([[50, 50, 60, 60], box], [0.9, 0.8], [0, 0], [box], [0])
    assert average_precision([second])["map_50"] == pytest.approx(0.5)
    # Two boxes on one object: the second is wrong, and comes after.
    twice = image([box, box], [0.9, 0.8], [0, 0], [box], [0])
    assert average_precision([twice])["map_50"] == pytest.approx(1.0)
    # Half of the objects are found: 51 of 101 recalls.
    half = image([box], [0.9], [0], [box, [20, 20, 30, 30]], [0, 0])
    assert average_precision([half])["map_50"] == pytest.approx(51 / 101)
    # Of two classes one is not found.
    other = image([box], [0.9], [0], [box, box], [0, 1])
    assert average_precision([other])["map_50"] == pytest.approx(0.5)
    assert np.isnan(average_precision([image([box], [0.9], [0], [], [])])["map"])


def scenes(seed: int) -> list[ImageBoxes]:
    """Random objects, and boxes near some of them, twice on others, and elsewhere; equal scores among them."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(25):
        corner = rng.uniform(0, 80, (int(rng.integers(0, 6)), 2))
        size = rng.uniform(5, 40, corner.shape)
        true = np.concatenate([corner, corner + size], axis=1)
        true_classes = rng.integers(0, 4, len(true))
        near = np.repeat(true, 2, axis=0) + rng.normal(0, 3, (2 * len(true), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        classes = np.where(
            rng.random(len(near)) < 0.8, np.repeat(true_classes, 2), rng.integers(0, 5, len(near))
        )
        stray = rng.uniform(0, 60, (3, 2))
        boxes = np.concatenate([near, np.concatenate([stray, stray + 20], axis=1)])
        classes = np.concatenate([classes, rng.integers(0, 5, 3)])
        scores = np.round(rng.random(len(boxes)), 1)
        groups = np.concatenate(
            [corner := rng.uniform(0, 50, (2, 2)), corner + rng.uniform(20, 60, (2, 2))], axis=1
        )
        found.append(ImageBoxes(boxes, scores, classes, true, true_classes, groups, rng.integers(0, 5, 2)))
    return found


def pycocotools(images: list[ImageBoxes]) -> dict[str, float]:
    """What COCO's own code gives for the same boxes."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, one in enumerate(images):
        both = (one.true_boxes, one.true_classes, 0), (one.crowd_boxes, one.crowd_classes, 1)
        for boxes, classes, crowd in both:
            for box, category in zip(boxes, classes, strict=True):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                truth.append({"id": len(truth) + 1, "image_id": number, "category_id": int(category) + 1,
                              "bbox": [x, y, w, h], "area": w * h, "iscrowd": crowd})  # fmt: skip
        for box, score, category in zip(one.boxes, one.scores, one.classes, strict=True):
            results.append({"image_id": number, "category_id": int(category) + 1, "score": float(score),
                            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]})  # fmt: skip
    known = coco.COCO()
    known.dataset = {
        "info": {}, "images": [{"id": n} for n in range(len(images))], "annotations": truth,
        "categories": [{"id": n + 1, "name": str(n)} for n in range(5)],
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        known.createIndex()
        evaluation = cocoeval.COCOeval(known, known.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map": float(evaluation.stats[0]), "map_50": float(evaluation.stats[1])}


@pytest.mark.parametrize("seed", range(3))
def test_as_pycocotools(seed: int) -> None:
    images = scenes(seed)
    found = average_precision(images)
    assert 0.05 < found["map"] < 0.95
    assert found == pytest.approx(pycocotools(images), abs=1e-9)
    alone = [
        replace(one, crowd_boxes=np.empty((0, 4)), crowd_classes=np.empty(0, np.int64)) for one in images
    ]
    assert average_precision(alone) == pytest.approx(pycocotools(alone), abs=1e-9)
    assert average_precision(alone)["map"] < found["map"], "what is found in a group is not wrong"


def test_a_draw_of_images_is_that_of_copies() -> None:
    rng = np.random.default_rng(0)
    # Of equal scores in one image the order of copies would be another one.
    images = [replace(one, scores=rng.random(len(one.scores))) for one in scenes(4)]
    counts = rng.integers(0, 4, len(images))
    copies = [one for one, count in zip(images, counts, strict=True) for _ in range(count)]
    assert Precisions(images).of(counts) == pytest.approx(average_precision(copies), abs=1e-12)
    assert np.isnan(Precisions(images).of(np.zeros(len(images), np.int64))["map"])


def test_boxes_without_an_area_overlap_nothing() -> None:
    assert overlaps(np.array([[1.0, 1, 1, 1]]), np.array([[1.0, 1, 1, 1]])).tolist() == [[0.0]]
