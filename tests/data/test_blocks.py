"""Blocks: pure functions of (step, index), equal on any worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.blocks import BlockSource, CaptionBlocks, CropBlocks
from orchestrator.data.index import PhotoIndex, PhotoRow
from orchestrator.data.order import SampleOrder
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError

_CROPS = CropConfig(global_size=32, local_size=16, num_local=3, gram_size=48)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> PhotoIndex:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    rows = [
        PhotoRow("s", f"{i:02}.png", str(folder), "", 60, 40, caption=f"photo number {i}" if i < 20 else None)
        for i in range(24)
    ]
    return PhotoIndex(rows)


def _blocks(index: PhotoIndex, seed: int = 0, block_size: int = 4) -> CropBlocks:
    order = SampleOrder({"all": np.arange(24)}, batch_size=12, seed=seed)
    return CropBlocks(index, order, lambda step: _CROPS, patch_size=8, block_size=block_size, seed=seed)


def test_arrays_of_a_block(index: PhotoIndex) -> None:
    source: BlockSource = _blocks(index)
    block = source.load(5, 2)
    assert (block.step, block.index, block.weight, source.num_blocks) == (5, 2, 1.0, 3)
    shapes = {name: (array.shape, array.dtype) for name, array in block.arrays.items()}
    assert shapes == {
        "globals": ((2, 4, 3, 32, 32), np.uint8),
        "locals": ((3, 4, 3, 16, 16), np.uint8),
        "gram": ((2, 4, 3, 48, 48), np.uint8),
        "masks": ((2, 4, 16), np.bool_),
    }
    assert np.count_nonzero(block.arrays["masks"].any(-1)) == 4


def test_blocks_make_up_the_steps_samples(index: PhotoIndex) -> None:
    source = _blocks(index)
    drawn = [row for step in range(2) for i in range(3) for row in source.load(step, i).ids]
    assert sorted(drawn) == list(range(24))


def test_loading_order_and_history_change_nothing(index: PhotoIndex) -> None:
    one, two = _blocks(index), _blocks(index)
    places = [(step, i) for step in range(3) for i in range(3)]
    forwards = {place: one.load(*place) for place in places}
    backwards = {place: two.load(*place) for place in reversed(places)}
    for place in places:
        assert np.array_equal(forwards[place].ids, backwards[place].ids)
        for name, array in forwards[place].arrays.items():
            assert np.array_equal(array, backwards[place].arrays[name]), (place, name)


def test_steps_blocks_seeds_and_samples_all_draw_anew(index: PhotoIndex) -> None:
    masks = [
        _blocks(index, seed).load(step, i).arrays["masks"].tobytes()
        for seed, step, i in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    ]
    assert len(set(masks)) == 4
    # One photo in a dozen steps: as many different crops, although the file is the same.
    order = SampleOrder({"one": np.array([3])}, batch_size=4, seed=0)
    blocks = CropBlocks(index, order, lambda step: _CROPS, patch_size=8, block_size=4, seed=0)
    views = {view.tobytes() for step in range(3) for view in blocks.load(step, 0).arrays["gram"][0]}
    assert len(views) == 12


def test_resolution_may_change_by_step(index: PhotoIndex) -> None:
    order = SampleOrder({"all": np.arange(24)}, batch_size=4, seed=0)
    sizes = [32, 64]
    blocks = CropBlocks(
        index,
        order,
        lambda step: CropConfig(global_size=sizes[step % 2], local_size=16),
        patch_size=8,
        block_size=4,
        seed=0,
    )
    assert blocks.load(0, 0).arrays["masks"].shape == (2, 4, 16)
    assert blocks.load(1, 0).arrays["masks"].shape == (2, 4, 64)


def test_sizes_that_do_not_divide(index: PhotoIndex) -> None:
    order = SampleOrder({"all": np.arange(24)}, batch_size=12, seed=0)
    with pytest.raises(UserError, match="12 samples does not divide into blocks of 5"):
        CropBlocks(index, order, lambda step: _CROPS, patch_size=8, block_size=5, seed=0)
    with pytest.raises(UserError, match="global_size 32 is not a multiple of the patch size 7"):
        CropBlocks(index, order, lambda step: _CROPS, patch_size=7, block_size=4, seed=0)


def _encode(caption: str) -> list[int]:
    return [1, *(10 + len(word) for word in caption.split()), 2]


def test_caption_blocks(index: PhotoIndex) -> None:
    order = SampleOrder({"captioned": np.arange(20)}, batch_size=8, seed=0)
    blocks = CaptionBlocks(index, order, size=32, block_size=4, seed=0, encode=_encode, context=7)
    block = blocks.load(3, 1)
    assert block.arrays["images"].shape == (4, 3, 32, 32)
    assert block.arrays["lengths"].tolist() == [5] * 4
    for row, tokens in zip(block.ids, block.arrays["tokens"], strict=True):
        assert tokens.tolist() == [1, 15, 16, 10 + len(str(row)), 2, 0, 0]
    again = CaptionBlocks(index, order, size=32, block_size=4, seed=0, encode=_encode, context=7).load(3, 1)
    assert all(np.array_equal(block.arrays[name], again.arrays[name]) for name in block.arrays)


def test_long_captions_keep_their_end_of_text(index: PhotoIndex) -> None:
    order = SampleOrder({"captioned": np.arange(20)}, batch_size=4, seed=0)
    blocks = CaptionBlocks(index, order, size=16, block_size=4, seed=0, encode=_encode, context=3)
    assert blocks.load(0, 0).arrays["tokens"].tolist() == [[1, 15, 2]] * 4
    assert blocks.load(0, 0).arrays["lengths"].tolist() == [3] * 4


def test_photos_without_captions_are_named(index: PhotoIndex) -> None:
    order = SampleOrder({"all": np.arange(24)}, batch_size=4, seed=0)
    with pytest.raises(UserError, match=r"4 photos have no caption, the first is 20\.png"):
        CaptionBlocks(index, order, size=16, block_size=4, seed=0, encode=_encode)


def test_the_data_package_does_not_import_torch() -> None:
    """Crop producers are processes that need no torch; loading it would cost each of them seconds."""
    modules = [
        f"orchestrator.data.{path.stem}" for path in _package().glob("*.py") if path.stem != "__init__"
    ]
    code = f"import sys, {', '.join(modules)}; assert not {{'torch', 'ray', 'mlflow'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=_package().parents[1])


def _package() -> Path:
    import orchestrator.data

    return Path(orchestrator.data.__path__[0])
