"""COCO's files: what is read, what is a mistake, and what of a box is in a crop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from orchestrator.config.boxes import BoxData
from orchestrator.data.boxes import BoxPictures
from orchestrator.data.crops import Box
from orchestrator.data.labelled_blocks import BoxLabels
from orchestrator.errors import UserError

NAMES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}]


def written(folder: Path, **changes: Any) -> BoxData:
    """Two pictures of 40 x 30 in a subfolder, with a cat, a dog and a group."""
    (folder / "val").mkdir(parents=True, exist_ok=True)
    for name in ("b.png", "a.png"):
        cv2.imwrite(str(folder / "val" / name), np.zeros((30, 40, 3), np.uint8))
    record: dict[str, Any] = {
        "images": [{"id": 5, "file_name": "b.png", "width": 40, "height": 30},
                   {"id": 6, "file_name": "val/a.png", "width": 40, "height": 30}],
        "annotations": [
            {"image_id": 5, "category_id": 7, "bbox": [4, 3, 20, 12], "iscrowd": 0},
            {"image_id": 5, "category_id": 2, "bbox": [30, 20, 10, 10]},
            {"image_id": 5, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        "categories": NAMES,
        **changes,
    }  # fmt: skip
    (folder / "boxes.json").write_text(json.dumps(record))
    return BoxData.model_validate({"path": folder, "annotations": str(folder / "boxes.json")})


def test_pictures_are_found_below_the_folder_and_groups_are_apart(tmp_path: Path) -> None:
    pictures = BoxPictures(written(tmp_path))
    assert [path.name for path in pictures.paths] == ["a.png", "b.png"]
    assert pictures.names == {7: "cat", 2: "dog"}
    boxes, categories = pictures.boxes(1)
    np.testing.assert_array_equal(boxes, [[4, 3, 24, 15], [30, 20, 40, 30]])
    assert categories.tolist() == [7, 2]
    assert pictures.boxes(0)[0].shape == (0, 4)
    groups, categories = pictures.crowds(1)
    np.testing.assert_array_equal(groups, [[0, 0, 40, 30]])
    assert categories.tolist() == [2]
    pictures.check()
    index = pictures.index()
    assert [index[row].path for row in range(2)] == ["val/a.png", "val/b.png"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"categories": None}, "the file has no list 'categories'"),
        ({"images": [{"id": 1, "file_name": "c.png", "width": 4, "height": 3}]}, "there is no picture c.png"),
        ({"annotations": [{"image_id": 9, "category_id": 7, "bbox": [0, 0, 1, 1]}]}, "a box refers to image 9"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "a box refers to category 1"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1]}]}, "a box of val/b.png is"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [40, 0, 9, 9]}]}, "lies outside of its 40x30"),
        ({"annotations": [{"image_id": 5, "bbox": [0, 0, 1, 1]}]}, "an entry lacks one of image_id, category_id"),
        ({"categories": [*NAMES, {"id": 7, "name": "elk"}]}, "the category 7 is 'cat' and 'elk'"),
        ({"categories": [{"id": "cat", "name": "cat"}]}, "the id of the category cat is 'cat'"),
        ({"images": [{"id": 5, "file_name": "b.png", "width": None, "height": 30}]}, "val/b.png is None x 30"),
        ({"images": [{"id": 5, "file_name": "b.png", "width": 0, "height": 30}]}, "val/b.png is 0 x 30"),
        ({"images": [{"file_name": "b.png", "width": 40, "height": 30}]}, "an entry lacks one of .*, id"),
        ({"images": [{"id": [], "file_name": "b.png", "width": 40, "height": 30}]}, "val/b.png is not a number"),
        ({"images": [{"id": 5, "file_name": name, "width": 40, "height": 30} for name in ("a.png", "b.png")]},
         "the id 5 of the picture val/b.png is that of another one, too"),
        ({"annotations": [{"image_id": [], "category_id": 7, "bbox": [0, 0, 1, 1]}]}, "a box refers to image"),
        ({"annotations": [{"image_id": 5, "category_id": {}, "bbox": [0, 0, 1, 1]}]}, "a box refers to category {}"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, 10**400, 1]}]}, "a box of val/b.png is"),
        ({"annotations": [{"image_id": 5, "category_id": 7, "bbox": [0, 0, True, 1]}]}, "a box of val/b.png is"),
    ],
)  # fmt: skip
def test_mistakes_are_told(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        BoxPictures(written(tmp_path, **changes))


def test_boxes_of_another_size_and_files_that_are_none_are_told(tmp_path: Path) -> None:
    images = [{"id": 5, "file_name": "val/b.png", "width": 80, "height": 60}]
    with pytest.raises(UserError, match="has 40x30 pixels, and its boxes are in 80x60"):
        BoxPictures(written(tmp_path, images=images, annotations=[])).check()
    data = written(tmp_path)
    (tmp_path / "boxes.json").write_text("{")
    with pytest.raises(UserError, match="the boxes cannot be read"):
        BoxPictures(data)


def test_boxes_are_in_the_picture_as_it_is_seen(tmp_path: Path) -> None:
    data = written(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "val" / "b.png", exif=exif)
    with pytest.raises(UserError, match="has 30x40 pixels, and its boxes are in 40x30"):
        BoxPictures(data).check()
    Image.new("RGB", (30, 40)).save(tmp_path / "val" / "b.png", exif=exif)
    BoxPictures(data).check()


def test_boxes_go_with_their_crop(tmp_path: Path) -> None:
    labels = BoxLabels(BoxPictures(written(tmp_path)), [2, 7], most=3)
    # The photograph at twice its size; the crop has all of the cat and nothing of the dog.
    found = labels.arrays(1, (60, 80), Box(0, 0, 40, 50), 16)
    assert found["classes"].tolist() == [1, -1, -1]
    np.testing.assert_allclose(found["boxes"][0], [28 / 50, 18 / 40, 40 / 50, 24 / 40], rtol=1e-6)
    turned = labels.arrays(1, (60, 80), Box(0, 0, 40, 50, flip=True), 16)
    np.testing.assert_allclose(turned["boxes"][0], [1 - 28 / 50, 18 / 40, 40 / 50, 24 / 40], rtol=1e-6)
    # Half of the cat is cut off; of the dog less than the least part is left.
    half = labels.arrays(1, (30, 40), Box(0, 14, 22, 18), 16)
    assert half["classes"].tolist() == [1, -1, -1]
    np.testing.assert_allclose(half["boxes"][0], [5 / 18, 9 / 22, 10 / 18, 12 / 22], rtol=1e-6)
    # Of more objects than there is room for, the largest.
    one = BoxLabels(BoxPictures(written(tmp_path)), [2, 7], most=1).arrays(1, (30, 40), Box(0, 0, 30, 40), 16)
    assert one["classes"].tolist() == [1]
