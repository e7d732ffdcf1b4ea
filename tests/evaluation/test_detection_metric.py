"""Detection as a metric: what pycocotools gives for the same boxes, and who is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.config.boxes import BoxData
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure
from orchestrator.evaluation.metrics.detection import DetectionPrecision, in_square

from .test_average_precision import ImageBoxes, pycocotools

WIDTH, HEIGHT = 60, 40
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 9, "name": "blue"}]
COLOURS = {3: (250, 0, 0), 9: (0, 0, 250)}


@pytest.fixture
def data(tmp_path: Path) -> BoxData:
    """Twelve grey pictures, each with a red and a blue box; one in three has a group, too."""
    rng, images, boxes = np.random.default_rng(0), [], []
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        pixels = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
        pixels[0, 0] = number
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        for category, left in ((3, 12), (9, 32)):
            x, y, w, h = left + int(rng.integers(6)), int(rng.integers(15)), 10, 14
            pixels[y : y + h, x : x + w] = COLOURS[category]
            boxes.append({"image_id": number, "category_id": category, "bbox": [x, y, w, h]})
        if number % 3 == 0:
            boxes.append({"image_id": number, "category_id": 3, "bbox": [10, 20, 40, 20], "iscrowd": 1})
        # Hardly in the square.
        boxes.append({"image_id": number, "category_id": 9, "bbox": [0, 0, 12, 9]})
        Image.fromarray(pixels).save(tmp_path / f"pictures/{number}.png")
    record = {"images": images, "annotations": boxes, "categories": CATEGORIES}
    (tmp_path / "instances_all.json").write_text(json.dumps(record))
    split = {"by": "hash", "near_duplicate": 1.0, "validation_share": 0.2, "test_share": 0.5}
    return BoxData.model_validate(
        {"path": tmp_path / "pictures", "annotations": tmp_path / "instances_all.json", "split": split}
    )


class Finder:
    """Finds reds rather well, blues badly, and something that is not there. Keeps what it said."""

    def __init__(self) -> None:
        self.said: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def __call__(self, squares: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        found = []
        for at, square in enumerate(squares.astype(int)):
            boxes, scores, places = [], [], []
            for place, (channel, other) in enumerate(((2, 0), (0, 2))):
                y, x = np.nonzero((square[..., channel] > 200) & (square[..., other] < 60))
                box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / len(square)
                boxes.append(box + (0.04 if place == 0 else 0.002) * (at % 3))
                scores.append(0.9 - 0.1 * at)
                places.append(place)
            boxes.append(np.array([0.3, 0.6, 0.5, 0.9]))
            found.append((np.stack(boxes), np.array([*scores, 0.95]), np.array([*places, 1])))
        self.said += found
        return found


def features(boxes: Finder | None, classes: tuple[str, ...] = ("blue", "red")) -> Features:
    return Features(
        "finetune", "fine-tuned", np.zeros((0, 3), np.float32), [], [], 0, lambda: np.zeros((0, 0, 3)), size=40,
        patch=4, boxes=boxes, classes=classes,
    )  # fmt: skip


def test_it_is_what_pycocotools_gives_for_the_same_boxes(data: BoxData) -> None:
    metric, finder = DetectionPrecision(use="detection", data=data), Finder()
    metric.check()
    figures = metric.measure(features(finder))
    assert metric._opened is not None
    pictures, splits = metric._opened
    images = []
    for row, (boxes, scores, places) in zip(splits.test.tolist(), finder.said, strict=True):
        true, crowd = (in_square(pictures, row, of, least) for of, least in
                       ((pictures.boxes(row), 0.3), (pictures.crowds(row), 0.0)))  # fmt: skip
        images.append(ImageBoxes(boxes, scores, np.array([9, 3])[places], *true, *crowd))
        assert len(true[0]) == 2, "the third has less than 0.3 of its box in the square"
    # pycocotools tells areas of thousands of pixels, not of shares.
    scaled = [
        ImageBoxes(
            one.boxes * 40, one.scores, one.classes // 9, one.true_boxes * 40, one.true_classes // 9,
            one.crowd_boxes * 40, one.crowd_classes // 9,
        )
        for one in images
    ]  # fmt: skip
    expected = pycocotools(scaled)
    for name, figure in figures.items():
        assert isinstance(figure, Figure)
        assert figure.value == pytest.approx(expected[name], abs=1e-9)
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
        assert (figure.split, figure.num) == ("test", len(splits.test))
    assert 0.1 < expected["map"] < expected["map_50"]


def test_models_that_find_no_boxes_have_no_row(data: BoxData) -> None:
    assert DetectionPrecision(use="detection", data=data).measure(features(None)) == {}


def test_a_category_that_was_not_learned_is_not_found(data: BoxData) -> None:
    class OnlyBlue(Finder):
        def __call__(self, squares: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            return [(b[p == 0], s[p == 0], p[p == 0]) for b, s, p in super().__call__(squares)]

    found = DetectionPrecision(use="detection", data=data).measure(features(OnlyBlue(), ("blue",)))["map_50"]
    assert isinstance(found, Figure)
    assert found.value <= 0.5
    assert found.note == "1 categories that the model did not learn"


def test_what_a_model_learned_from_is_split_alike(data: BoxData) -> None:
    metric = DetectionPrecision(use="detection", data=data)
    assert metric.is_fair(data)
    assert metric.is_fair(None)
    assert not metric.is_fair(data.model_copy(update={"split": None}))


def test_files_and_mistakes(data: BoxData, tmp_path: Path) -> None:
    metric = DetectionPrecision(use="detection", data=data)
    assert len(metric.files()["data.path"]) == 12
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(data.path / "3.png")
    with pytest.raises(UserError, match=r"3\.png has 9x9 pixels, and its boxes are in 60x40"):
        metric.check()
