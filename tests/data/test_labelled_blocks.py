"""Blocks with labels: the same on every worker, each image of a split once, and pictures as evaluation sees them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from orchestrator.data.crops import Box, cut
from orchestrator.data.decode import read_square
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.labelled_blocks import (
    ClassLabels,
    LabelledBlocks,
    SplitBlocks,
    centre_box,
    nearest_crop,
)
from orchestrator.data.sampler import SampleOrder
from orchestrator.errors import UserError

NUM = 11


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM):
        pixels = cv2.resize(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), (70, 50))
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
        rows.append(ImageRecord("photos", f"{number}.png", str(tmp_path), f"{number}", 70, 50))
    return ImageIndex(rows)


def training(index: ImageIndex, **settings: object) -> LabelledBlocks:
    given = {"scale": (0.4, 1.0), "flip": True, **settings}
    return LabelledBlocks(
        index,
        SampleOrder({"train": np.arange(8)}, batch_size=6, seed=3),
        ClassLabels(np.arange(NUM) % 4),
        size=16,
        block_size=3,
        seed=5,
        max_unreadable=0.0,
        **given,  # type: ignore[arg-type]
    )


def test_a_block_is_a_function_of_step_and_index(index: ImageIndex) -> None:
    one, other = training(index), training(index)
    other.load(0, 1)  # whatever was loaded before
    for step, at in ((0, 0), (2, 1)):
        first, second = one.load(step, at), other.load(step, at)
        np.testing.assert_array_equal(first.ids, second.ids)
        for name, array in first.arrays.items():
            np.testing.assert_array_equal(array, second.arrays[name], err_msg=name)
        assert first.arrays["images"].shape == (3, 3, 16, 16)
        np.testing.assert_array_equal(first.arrays["classes"], first.ids % 4)
        np.testing.assert_array_equal(first.arrays["weights"], np.ones(3, np.float32))
        assert set(first.ids.tolist()) <= set(range(8)), "a row of another split"
    assert not np.array_equal(one.load(0, 0).arrays["images"], one.load(8, 0).arrays["images"])


def test_whole_crops_are_mirrored_half_of_the_time_or_never(index: ImageIndex) -> None:
    def mirrored(flip: bool) -> list[bool]:
        blocks = training(index, scale=(1.0, 1.0), flip=flip)
        found = []
        for step in range(12):
            block = blocks.load(step, 0)
            for row, image in zip(block.ids, block.arrays["images"], strict=True):
                whole = cv2.cvtColor(cv2.imread(str(index.path(int(row)))), cv2.COLOR_BGR2RGB)
                # A whole photograph of another shape is cut to its largest centred box of an aspect of 4/3.
                left = (70 - 66) // 2
                seen = cv2.resize(whole[:, left : left + 66], (16, 16), interpolation=cv2.INTER_AREA)
                straight = np.abs(image.transpose(1, 2, 0).astype(int) - seen).mean()
                turned = np.abs(image.transpose(1, 2, 0).astype(int) - seen[:, ::-1]).mean()
                assert min(straight, turned) < 5
                found.append(turned < straight)
        return found

    assert not any(mirrored(False))
    assert 0.25 < np.mean(mirrored(True)) < 0.75


def test_a_split_has_each_image_once_as_a_centred_square(index: ImageIndex) -> None:
    rows = [1, 4, 5, 9, 10]
    blocks = SplitBlocks(index, rows, ClassLabels(np.arange(NUM) % 4), size=16, block_size=3)
    assert blocks.num_blocks == 2
    loaded = [blocks.load(step, at) for step, at in ((0, 0), (7, 1))]
    seen = [
        int(row)
        for block in loaded
        for row, weight in zip(block.ids, block.arrays["weights"], strict=True)
        if weight > 0
    ]
    assert seen == rows
    for block in loaded:
        for row, image in zip(block.ids, block.arrays["images"], strict=True):
            np.testing.assert_array_equal(image.transpose(1, 2, 0), read_square(index.path(int(row)), 16))
    # The mean over blocks of the mean of weight · value is the mean over the split.
    values = np.mean([np.mean(block.arrays["weights"] * block.ids**2.0) for block in loaded])
    assert values == pytest.approx(np.mean(np.square(rows, dtype=float)))


def test_an_image_of_a_split_that_is_gone_is_a_mistake_and_not_left_out(index: ImageIndex) -> None:
    blocks = SplitBlocks(index, [0, 1], ClassLabels(np.zeros(NUM, np.int64)), size=16, block_size=2)
    index.path(1).unlink()
    with pytest.raises(UserError, match="a photo of the split cannot be read any more"):
        blocks.load(0, 0)


def test_the_centre_is_the_largest_square() -> None:
    box = centre_box(50, 71)
    assert (box.top, box.left, box.height, box.width, box.flip) == (0, 10, 50, 50, False)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [1, 2])
def test_targets_are_cropped_where_pictures_are_and_never_mixed(flip: bool, scale: int) -> None:
    """A target that has the picture's own numbers, at the same or twice the resolution."""
    picture = np.kron(np.arange(35, dtype=np.uint8).reshape(5, 7) * 7, np.ones((8, 8), np.uint8))
    target = np.kron(picture, np.ones((scale, scale), np.uint8)).astype(np.int64)
    box = Box(8, 16, 24, 32, flip)
    found = nearest_crop(target, (picture.shape[0], picture.shape[1]), box, 48)
    assert set(np.unique(found)) <= set(np.unique(picture[8:32, 16:48]))
    seen = cut(np.stack([picture] * 3, axis=-1), box, 48)[..., 0].astype(np.int64)
    # Between cells the picture is mixed.
    assert (np.abs(found - seen) <= 1).mean() > 0.6
    exact = nearest_crop(target, (picture.shape[0], picture.shape[1]), Box(8, 16, 24, 24, flip), 24)
    wanted = picture[8:32, 16:40]
    np.testing.assert_array_equal(exact, wanted[:, ::-1] if flip else wanted)
