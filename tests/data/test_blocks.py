"""Blocks: pure functions of (step, index), equal on any worker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.blocks import BlockSource, CaptionBlocks, CropBlocks
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError

_CROPS = CropConfig(global_size=32, local_size=16, num_local=3, gram_size=48)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    rows = [
        ImageRecord(
            "s", f"{i:02}.png", str(folder), "", 60, 40, caption=f"photo number {i}" if i < 20 else None
        )
        for i in range(24)
    ]
    return ImageIndex(rows)


def _blocks(
    index: ImageIndex, seed: int = 0, block_size: int = 4, max_unreadable: float = 0.01
) -> CropBlocks:
    order = SampleOrder({"all": np.arange(24)}, batch_size=12, seed=seed)
    return CropBlocks(
        index,
        order,
        lambda step: _CROPS,
        patch_size=8,
        block_size=block_size,
        seed=seed,
        max_unreadable=max_unreadable,
    )


def test_arrays_of_a_block(index: ImageIndex) -> None:
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


def test_blocks_make_up_the_steps_samples(index: ImageIndex) -> None:
    source = _blocks(index)
    drawn = [row for step in range(2) for i in range(3) for row in source.load(step, i).ids]
    assert sorted(drawn) == list(range(24))


def test_loading_order_and_history_change_nothing(index: ImageIndex) -> None:
    one, two = _blocks(index), _blocks(index)
    places = [(step, i) for step in range(3) for i in range(3)]
    forwards = {place: one.load(*place) for place in places}
    backwards = {place: two.load(*place) for place in reversed(places)}
    for place in places:
        assert np.array_equal(forwards[place].ids, backwards[place].ids)
        for name, array in forwards[place].arrays.items():
            assert np.array_equal(array, backwards[place].arrays[name]), (place, name)


def test_steps_blocks_seeds_and_samples_all_draw_anew(index: ImageIndex) -> None:
    masks = [
        _blocks(index, seed).load(step, i).arrays["masks"].tobytes()
        for seed, step, i in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    ]
    assert len(set(masks)) == 4
    # One photo in a dozen steps: as many different crops, although the file is the same.
    order = SampleOrder({"one": np.array([3])}, batch_size=4, seed=0)
    blocks = CropBlocks(
        index, order, lambda step: _CROPS, patch_size=8, block_size=4, seed=0, max_unreadable=0.01
    )
    views = {view.tobytes() for step in range(3) for view in blocks.load(step, 0).arrays["gram"][0]}
    assert len(views) == 12


def test_resolution_may_change_by_step(index: ImageIndex) -> None:
    order = SampleOrder({"all": np.arange(24)}, batch_size=4, seed=0)
    sizes = [32, 64]
    blocks = CropBlocks(
        index,
        order,
        lambda step: CropConfig(global_size=sizes[step % 2], local_size=16),
        patch_size=8,
        block_size=4,
        seed=0,
        max_unreadable=0.01,
    )
    assert blocks.load(0, 0).arrays["masks"].shape == (2, 4, 16)
    assert blocks.load(1, 0).arrays["masks"].shape == (2, 4, 64)


def test_sizes_that_do_not_divide(index: ImageIndex) -> None:
    order = SampleOrder({"all": np.arange(24)}, batch_size=12, seed=0)
    with pytest.raises(UserError, match="12 samples does not divide into blocks of 5"):
        CropBlocks(index, order, lambda step: _CROPS, patch_size=8, block_size=5, seed=0, max_unreadable=0.01)
    with pytest.raises(UserError, match="global_size 32 is not a multiple of the patch size 7"):
        CropBlocks(index, order, lambda step: _CROPS, patch_size=7, block_size=4, seed=0, max_unreadable=0.01)


def _encode(caption: str) -> list[int]:
    return [1, *(10 + len(word) for word in caption.split()), 2]


def test_caption_blocks(index: ImageIndex) -> None:
    order = SampleOrder({"captioned": np.arange(20)}, batch_size=8, seed=0)
    blocks = CaptionBlocks(
        index, order, size=32, block_size=4, seed=0, max_unreadable=0.01, encode=_encode, context=7
    )
    block = blocks.load(3, 1)
    assert block.arrays["images"].shape == (4, 3, 32, 32)
    assert block.arrays["lengths"].tolist() == [5] * 4
    for row, tokens in zip(block.ids, block.arrays["tokens"], strict=True):
        assert tokens.tolist() == [1, 15, 16, 10 + len(str(row)), 2, 0, 0]
    again = CaptionBlocks(
        index, order, size=32, block_size=4, seed=0, max_unreadable=0.01, encode=_encode, context=7
    ).load(3, 1)
    assert all(np.array_equal(block.arrays[name], again.arrays[name]) for name in block.arrays)


def test_long_captions_keep_their_end_of_text(index: ImageIndex) -> None:
    order = SampleOrder({"captioned": np.arange(20)}, batch_size=4, seed=0)
    blocks = CaptionBlocks(
        index, order, size=16, block_size=4, seed=0, max_unreadable=0.01, encode=_encode, context=3
    )
    assert blocks.load(0, 0).arrays["tokens"].tolist() == [[1, 15, 2]] * 4
    assert blocks.load(0, 0).arrays["lengths"].tolist() == [3] * 4


def test_photos_without_captions_are_named(index: ImageIndex) -> None:
    order = SampleOrder({"all": np.arange(24)}, batch_size=4, seed=0)
    with pytest.raises(UserError, match=r"4 photos have no caption, the first is 20\.png"):
        CaptionBlocks(index, order, size=16, block_size=4, seed=0, max_unreadable=0.01, encode=_encode)


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


# --- pictures that cannot be read -----------------------------------------------------------------------------------


def _losing(index: ImageIndex, folder: Path, *lost: int) -> ImageIndex:
    """The same pictures, some of them damaged since they were indexed."""
    rows = []
    for number in range(len(index)):
        shutil.copy(index.path(number), folder / index[number].path)
        if number in lost:
            (folder / index[number].path).write_bytes(index.path(number).read_bytes()[:60])
        rows.append(replace(index[number], root=str(folder)))
    return ImageIndex(rows)


def _place(source: CropBlocks, row: int) -> tuple[int, int, int]:
    """The step, block and sample where a row comes first."""
    for step in range(4):
        for number in range(source.num_blocks):
            for sample, known in enumerate(source.load(step, number).ids):
                if known == row:
                    return step, number, sample
    raise AssertionError


def test_another_photo_stands_for_one_that_cannot_be_read(
    index: ImageIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _blocks(index)
    step, number, sample = _place(whole, 7)
    source = _blocks(_losing(index, tmp_path, 7))
    expected, block = whole.load(step, number), source.load(step, number)
    stand_in = -1 - block.ids[sample]
    assert block.num_replaced == 1
    assert 0 <= stand_in != 7
    drawn = [row for i in range(3) for row in whole.load(step, i).ids]
    assert stand_in not in drawn, "a photo twice in a step"
    others = [place for place in range(4) if place != sample]
    assert np.array_equal(block.ids[others], expected.ids[others])
    for name in ("globals", "locals", "gram"):
        assert np.array_equal(block.arrays[name][:, others], expected.arrays[name][:, others])
        assert not np.array_equal(block.arrays[name][:, sample], expected.arrays[name][:, sample])
    assert np.array_equal(block.arrays["masks"], expected.arrays["masks"])
    source.load(step, number)
    (said,) = caplog.messages
    assert "07.png" in said
    assert (source.pop_troubles(), source.pop_troubles()) == ([said], [])


def test_the_stand_in_is_the_same_on_any_worker(index: ImageIndex, tmp_path: Path) -> None:
    """Blocks are loaded in every order, by sources that met other pictures before."""
    damaged = _losing(index, tmp_path, 2, 11)
    places = [(step, number) for step in range(6) for number in range(3)]
    one = _blocks(damaged, max_unreadable=0.1)
    forwards = {place: one.load(*place) for place in places}
    assert sum(block.num_replaced for block in forwards.values()) == 6
    for worker in range(3):
        own = _blocks(damaged, max_unreadable=0.1)
        for place in places[::-1][worker::3]:
            block = own.load(*place)
            assert np.array_equal(block.ids, forwards[place].ids)
            for name, array in block.arrays.items():
                assert np.array_equal(array, forwards[place].arrays[name])


def test_stand_ins_come_from_the_same_component(index: ImageIndex, tmp_path: Path) -> None:
    damaged = _losing(index, tmp_path, 0)
    components = {"few": np.arange(4), "many": np.arange(4, 24)}
    order = SampleOrder(components, {"few": 1.0, "many": 1.0}, batch_size=12, seed=0)
    source = CropBlocks(
        damaged, order, lambda step: _CROPS, patch_size=8, block_size=12, seed=0, max_unreadable=0.01
    )
    replaced = [-1 - row for step in range(12) for row in source.load(step, 0).ids if row < 0]
    assert replaced
    assert set(replaced) <= {1, 2, 3}


def test_too_many_unreadable_photos_end_the_stage_with_their_names(index: ImageIndex, tmp_path: Path) -> None:
    source = _blocks(_losing(index, tmp_path, 3, 5, 8), max_unreadable=2 / 24)
    with pytest.raises(UserError) as raised:
        _ = [source.load(step, number) for step in range(8) for number in range(3)]
    said = str(raised.value)
    assert "3 of 24 photos cannot be read any more" in said
    assert all(f"{number:02}.png" in said for number in (3, 5, 8))
    assert "max_unreadable" in said


def test_a_folder_that_is_gone_is_one_message(index: ImageIndex, tmp_path: Path) -> None:
    gone = ImageIndex([replace(index[i], root=str(tmp_path / "gone")) for i in range(24)])
    with pytest.raises(UserError, match=r"8 photos in a row cannot be read.*No such file") as raised:
        _blocks(gone, max_unreadable=1.0).load(0, 0)
    assert raised.value.where == str(tmp_path / "gone")


def test_a_stand_in_brings_its_own_caption(index: ImageIndex, tmp_path: Path) -> None:
    damaged = _losing(index, tmp_path, 7)
    order = SampleOrder({"all": np.arange(20)}, batch_size=10, seed=1)
    source = CaptionBlocks(
        damaged,
        order,
        size=16,
        block_size=10,
        seed=3,
        max_unreadable=0.01,
        encode=lambda text: [int(text.split()[-1]), 99],
    )
    replaced = 0
    for step in range(2):
        block = source.load(step, 0)
        rows = np.where(block.ids < 0, -1 - block.ids, block.ids)
        assert block.arrays["tokens"][:, 0].tolist() == rows.tolist()
        assert 7 not in rows
        replaced += block.num_replaced
    assert replaced == 1


def test_replaced_photos_are_counted_over_all_workers() -> None:
    from torch import tensor

    from orchestrator.training.loop import _Trainer

    trainer = _Trainer.__new__(_Trainer)
    trainer.device, trainer.workers = "cpu", lambda packed: 2 * packed  # type: ignore[assignment]
    counted = trainer._sum_metrics({"loss": tensor(0.5)}, 3, 1)
    assert counted == {"loss": 1.0, "sample_order": 6.0, "replaced_photos": 2.0}
    assert "replaced_photos" not in trainer._sum_metrics({"loss": tensor(0.5)}, 3, 0)
