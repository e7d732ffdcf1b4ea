"""Images that were decoded once: the same pixels whether they were kept, are made now, or find no room."""

from __future__ import annotations

import errno
import hashlib
import os
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from orchestrator.config.pixels import PixelFormat
from orchestrator.data import image_cache, resized_images
from orchestrator.data.blocks import CaptionBlocks, CropBlocks
from orchestrator.data.decode import UnreadableImage, read_rgb
from orchestrator.data.image_cache import FOLDER, ImageCache
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.labelled_blocks import ClassLabels, LabelledBlocks
from orchestrator.data.resized_images import ResizedImages, resized_to
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.sources.shard_members import member_path
from orchestrator.data.views import CropConfig
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.training.loader_process import ProcessBlocks
from tests.band_files import write_tiff

_COUNT, _SIDE = 8, 96
_OPTIMIZER = {"lr": {"peak": 1e-3}}
_SMALL = 3
_TWELVE = PixelFormat(range=(0, 4095))
_FIVE_BANDS = PixelFormat(bands=(0, 1, 2, 3, 4), range=(0, 65535), mean=(0.5,) * 5, std=(0.2,) * 5)


@dataclass(frozen=True)
class Photos:
    """Makes a source of blocks of the photographs of an index; it can be pickled."""

    index: Path
    limit_gib: float = 1.0
    side: int | None = _SIDE

    def __call__(self) -> CropBlocks:
        crops = CropConfig(global_size=32, local_size=16, num_local=2)
        return CropBlocks(
            ImageIndex.load(self.index),
            SampleOrder({"all": np.arange(_COUNT)}, batch_size=_COUNT, seed=0),
            lambda step: crops,
            patch_size=16,
            block_size=4,
            seed=0,
            max_unreadable=0,
            resized=ResizedImages.opened(self.side, self.limit_gib),
        )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs, upright and not, one of which is small."""
    made = tmp_path / "photos"
    made.mkdir()
    china = Image.fromarray(load_sample_image("china.jpg"))
    for number in range(_COUNT):
        size = (80, 60) if number == _SMALL else (300, 500) if number % 2 else (500, 300)
        china.crop((number, number, 600, 420)).resize(size).save(made / f"{number}.jpg", quality=92)
    return made


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Path:
    made = tmp_path / "index"
    made.mkdir()
    ImageIndex([record_of(path) for path in sorted(folder.iterdir())]).save(made)
    return made


def record_of(path: Path) -> ImageRecord:
    with Image.open(path) as image:
        width, height = image.size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageRecord("x", path.name, str(path.parent), digest, width, height, caption="a pagoda")


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.shard"))


def num_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in shards(cache))


def views(source: Any, step: int = 0) -> dict[str, NDArray[Any]]:
    blocks = [source.load(step, index) for index in range(_COUNT // 4)]
    assert not any(len(block.unreadable) for block in blocks)
    return {name: np.concatenate([one.arrays[name] for one in blocks], 1) for name in ("globals", "locals")}


def same(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in ("globals", "locals"))


def reader(cache: Path, side: int = _SIDE, limit: int = 1 << 30) -> tuple[ResizedImages, ImageCache]:
    """As another process has it: it knows what is in the folder, and nothing else."""
    kept = ImageCache(cache, limit)
    return ResizedImages(side, kept), kept


def read(
    resized: ResizedImages,
    record: ImageRecord,
    pixels: PixelFormat | None = None,
    min_side: int | None = None,
) -> NDArray[Any]:
    path = Path(record.root) / record.path
    return resized.use(record, path, lambda image: np.array(image), min_side, pixels)


def decoded(
    cache: Path, record: ImageRecord, pixels: PixelFormat | None = None, side: int = _SIDE
) -> NDArray[Any]:
    """The pixels of a record, by a reader whose cache is written when this returns."""
    resized, kept = reader(cache, side)
    found = read(resized, record, pixels)
    kept.flush()
    return found


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_crops_are_the_same_cold_and_warm_without_room_and_in_processes(index: Path, cache: Path) -> None:
    without_room = views(Photos(index, 1e-9)())
    assert num_bytes(cache) == 0
    cold = views(Photos(index)())
    filled = num_bytes(cache)
    assert filled > 0
    warm = views(Photos(index)())
    with closing(ProcessBlocks(Photos(index), _COUNT // 4)) as processes:
        processes.start(2)
        elsewhere = views(processes)
    assert same(cold, without_room)
    assert same(cold, warm)
    assert same(cold, elsewhere)
    assert not same(cold, views(Photos(index, side=None)()))


def test_threads_read_what_one_reads(index: Path, cache: Path) -> None:
    steps = range(4)
    alone = [views(Photos(index, 1e-9)(), step) for step in steps]
    source = Photos(index)()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda step: views(source, step), steps))
    assert num_bytes(cache) > 0
    assert all(map(same, alone, together))


def test_stages_and_all_kinds_of_blocks_read_so(index: Path, cache: Path) -> None:
    loaded = ImageIndex.load(index)
    order = SampleOrder({"all": np.arange(_COUNT)}, batch_size=_COUNT, seed=0)

    def sources(side: int | None) -> list[Any]:
        resized = ResizedImages.opened(side, 1.0)
        config = Pretrain.model_validate({
            "kind": "pretrain", "steps": 1, "batch_size": _COUNT, "block_size": 4, "optimizer": _OPTIMIZER,
            "model": "vit_nano", "crops": {"global_size": 32, "local_size": 16}, "cached_side": side,
        })  # fmt: skip
        common = {"size": 64, "block_size": 4, "seed": 0, "max_unreadable": 0, "resized": resized}
        return [
            crop_blocks(config, None, index, 0),
            CaptionBlocks(loaded, order, encode=lambda text: [1, 2], context=4, **common),
            LabelledBlocks(
                loaded, order, ClassLabels(np.arange(_COUNT)), scale=(0.3, 1.0), flip=True, **common
            ),
        ]

    for number in range(3):
        for path in shards(cache):
            path.unlink()
        name = "globals" if number == 0 else "images"
        cold, warm, plain = (sources(side)[number].load(0, 0).arrays[name] for side in (_SIDE, _SIDE, None))
        assert num_bytes(cache) > 0
        assert np.array_equal(cold, warm)
        assert cold.shape == plain.shape
        assert not np.array_equal(cold, plain)


def test_an_image_in_a_shard(folder: Path, tmp_path: Path, cache: Path) -> None:
    record, path = record_of(folder / "0.jpg"), tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "0.jpg", "0.jpg")
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    name = member_path("a.tar", member.offset_data, member.size, "0.jpg")
    there = decoded(cache, replace(record, root=str(tmp_path), path=name))
    path.unlink()
    assert np.array_equal(there, decoded(cache, replace(record, root=str(tmp_path), path=name)))
    # Content decides: the file beside is the same image.
    before = num_bytes(cache)
    assert np.array_equal(there, decoded(cache, record))
    assert num_bytes(cache) == before


def test_an_image_is_resized_to_its_shorter_side_and_a_small_one_stays_as_it_is(
    folder: Path, cache: Path
) -> None:
    for path in sorted(folder.iterdir()):
        found = decoded(cache, record_of(path))
        with Image.open(path) as image:
            if path.stem == str(_SMALL):
                assert np.array_equal(found, read_rgb(path))
                continue
            wide = (160, 96) if image.width > image.height else (96, 160)
            expected = np.asarray(image.resize(wide, Image.Resampling.BICUBIC), np.float64)
        assert found.shape == expected.shape
        noise = np.square(found - expected).mean()
        assert 10 * np.log10(255**2 / noise) > 30


def test_what_is_kept_needs_no_file(index: Path, folder: Path, cache: Path) -> None:
    found = ImageIndex.load(index)
    cold = [decoded(cache, record) for record in found]
    for path in folder.iterdir():
        path.unlink()
    for row, record in enumerate(found):
        if row == _SMALL:
            with pytest.raises(UnreadableImage):
                decoded(cache, record)
        else:
            assert np.array_equal(decoded(cache, record), cold[row])


def test_a_file_that_is_another_one_by_now_is_not_kept(folder: Path, cache: Path) -> None:
    path = folder / "0.jpg"
    record = record_of(path)
    before = path.read_bytes()
    Image.new("RGB", (500, 300), "red").save(path)
    assert decoded(cache, record)[:, :, 1].max() < 10
    assert num_bytes(cache) == 0
    path.write_bytes(before)
    assert decoded(cache, record)[:, :, 1].max() > 100


def test_settings_do_not_get_the_pixels_of_others(folder: Path, cache: Path) -> None:
    record = record_of(folder / "0.jpg")
    shapes = {}
    for side in (96, 128):
        resized, kept = reader(cache, side)
        shapes[side] = read(resized, record).shape
        kept.flush()
    assert shapes == {96: (96, 160, 3), 128: (128, 213, 3)}
    plain = decoded(cache, record)
    grey = decoded(cache, record, PixelFormat(bands=(0,)))
    dark = decoded(cache, record, PixelFormat(range=(0, 65535)))
    assert np.array_equal(grey[:, :, 0], grey[:, :, 1])
    assert not np.array_equal(plain, grey)
    assert dark.dtype == np.uint16


def test_another_decoder_does_not_get_what_this_one_made(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of(folder / "0.jpg")
    decoded(cache, record)
    before = num_bytes(cache)
    monkeypatch.setattr(resized_images, "decoder_versions", lambda: ["1", "pillow-heif 2"])
    decoded(cache, record)
    assert num_bytes(cache) == 2 * before


@pytest.mark.parametrize("longer", [65_500, 65_501, 65_536])
def test_a_strip_that_no_jpeg_can_hold(longer: int, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "strip.png"
    Image.fromarray(np.full((2 * longer, 64, 3), 200, np.uint8)).save(path)
    cold, warm = (decoded(cache, record_of(path), side=32) for _ in range(2))
    assert num_bytes(cache) > 0
    assert np.array_equal(cold, np.full((longer, 32, 3), 200))
    assert np.array_equal(cold, warm)


@pytest.mark.parametrize("pixels", [_TWELVE, _FIVE_BANDS])
def test_deep_and_many_bands_lose_no_value(pixels: PixelFormat, tmp_path: Path, cache: Path) -> None:
    """Of a slope the mean over the pixels that become one is the value at their middle."""
    height, width, bands = 288, 384, 1 if pixels is _TWELVE else 5
    rows, columns = np.mgrid[:height, :width]
    slopes = np.stack([100 + 3 * rows + (2 + band) * columns for band in range(bands)], axis=2)
    values_HWC = slopes.astype(np.uint16)
    path = tmp_path / "slope.tif"
    if bands == 1:
        Image.fromarray(values_HWC[:, :, 0]).save(path)
    else:
        write_tiff(path, values_HWC)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = ImageRecord("x", path.name, str(tmp_path), digest, width, height)
    cold, warm = decoded(cache, record, pixels), decoded(cache, record, pixels)
    assert num_bytes(cache) > 0
    assert cold.dtype == warm.dtype == np.uint16
    assert np.array_equal(cold, warm)
    rows, columns = np.mgrid[:96, :128] * 3 + 1
    middle = np.stack([100 + 3 * rows + (2 + band) * columns for band in range(bands)], axis=2)
    white = 4095 if bands == 1 else 65535
    expected = np.repeat(middle, 3, axis=2) if bands == 1 else middle
    error = np.abs(cold.astype(np.float64) * white / 65535 - expected)[4:-4, 4:-4]
    assert error.max() < 0.6


def test_a_resized_picture_of_16_bits_has_all_levels() -> None:
    """As OpenCV resizes fractions: by whole factors the mean of areas is near to any filter of a smooth picture."""
    noise = np.random.default_rng(0).random((12, 16, 3))
    smooth = cv2.resize(noise, (768, 576), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    made = resized_to((smooth * 65535).astype(np.uint16), 144)
    reference = cv2.resize(smooth, (192, 144), interpolation=cv2.INTER_AREA) * 65535
    assert made.shape == (144, 192, 3)
    assert len(np.unique(made)) > 10_000
    assert np.abs(made - reference).max() < 0.01 * 65535


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_damage_is_repaired(index: Path, cache: Path) -> None:
    records = [record for row, record in enumerate(ImageIndex.load(index)) if row != _SMALL]
    cold = [decoded(cache, record) for record in records]

    def damaged(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def written(path: Path) -> None:
        (cache / "index.sqlite3").write_bytes(b"no database" * 1000)

    for harm in (damaged, cut, Path.unlink, written):
        for path in shards(cache):
            harm(path)
        before = num_bytes(cache)
        again = [decoded(cache, record) for record in records]
        assert all(map(np.array_equal, cold, again))
        repaired = num_bytes(cache)
        assert repaired > before
        assert all(map(np.array_equal, cold, [decoded(cache, record) for record in records]))
        assert num_bytes(cache) == repaired


_READ = """
import sys
from pathlib import Path
import numpy as np
from tests.data.test_resized_images import Photos, views
source = Photos(Path(sys.argv[1]))()
print("ready", flush=True)
sys.stdin.readline()
np.savez(sys.argv[2], **views(source))
"""


def test_two_processes_at_once(index: Path, cache: Path, tmp_path: Path) -> None:
    out = [tmp_path / f"{number}.npz" for number in range(2)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _READ, index, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        for path in out
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in started:
        process.communicate(b"\n")
        assert process.returncode == 0
    found = [np.load(path) for path in out]
    filled = num_bytes(cache)
    here = views(Photos(index)())
    assert same(found[0], found[1])
    assert same(found[0], here)
    # What they have written is known here.
    assert filled > 0
    assert num_bytes(cache) == filled


def test_the_limit_holds_and_is_told_once(index: Path, cache: Path) -> None:
    records = [record for row, record in enumerate(ImageIndex.load(index)) if row != _SMALL]
    cold = [decoded(cache, record) for record in records]
    whole = num_bytes(cache)
    for path in (*shards(cache), cache / "index.sqlite3"):
        path.unlink()
    resized, kept = reader(cache, limit=whole // 2)
    assert all(map(np.array_equal, cold, [read(resized, record) for record in records]))
    assert 0 < num_bytes(cache) <= whole // 2
    assert len(resized.pop_troubles()) == 1
    assert all(map(np.array_equal, cold, [read(resized, record) for record in records]))
    assert not resized.pop_troubles()
    kept.flush()
    # What nobody reads makes room; what is read stays.
    for path in shards(cache):
        os.utime(path, (0, 0))
    old = shards(cache)
    resized, _ = reader(cache, side=64, limit=whole // 2)
    read(resized, records[0])
    assert not set(old) & set(shards(cache))
    assert 0 < num_bytes(cache) <= whole // 2


def test_what_is_read_does_not_go(index: Path, cache: Path) -> None:
    record = ImageIndex.load(index)[0]
    decoded(cache, record)
    (shard,) = shards(cache)
    os.utime(shard, (0, 0))
    decoded(cache, record)
    assert time.time() - shard.stat().st_mtime < 60
    resized, _ = reader(cache, side=64, limit=num_bytes(cache))
    read(resized, record)
    assert shards(cache) == [shard]
    assert "image_cache_gib" in resized.pop_troubles()[0]


@pytest.mark.parametrize("is_full", [True, False])
def test_a_disk_without_room_costs_nothing_but_time(
    is_full: bool, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ImageCache, data: bytes) -> tuple[int, int]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if is_full:
        monkeypatch.setattr(ImageCache, "_append", refuse)
    else:
        monkeypatch.setattr(image_cache, "space", lambda path: (40, 1000))
    source = Photos(index)()
    first, second = views(source), views(source)
    assert same(first, second)
    assert num_bytes(cache) == 0
    (trouble,) = source.pop_troubles()
    assert "disk" in trouble or "No space left" in trouble


def test_a_cache_that_cannot_be_there_costs_nothing_but_time(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    source = Photos(index)()
    first = views(source)
    assert len(source.pop_troubles()) == 1
    (tmp_path / "cache").unlink()
    assert same(first, views(Photos(index, 2.0)()))


def test_a_cache_that_cannot_even_be_asked_for_costs_nothing_but_time(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = views(Photos(index)())
    # As a folder that may not be looked into, which stops nothing where tests run as root.
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / ("x" * 300)))
    source = Photos(index)()
    assert same(first, views(source))
    assert len(source.pop_troubles()) == 1


def test_a_cache_that_may_only_be_read_is_read(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of(folder / "0.jpg")
    there = decoded(cache, record)
    Path(record.root, record.path).unlink()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", refuse)
    assert np.array_equal(there, decoded(cache, record))


def test_an_index_that_names_more_bytes_than_there_are(folder: Path, cache: Path) -> None:
    record = record_of(folder / "0.jpg")
    there = decoded(cache, record)
    with closing(sqlite3.connect(cache / "index.sqlite3")) as found, found:
        found.execute("UPDATE images SET size = ?", (1 << 50,))
    assert np.array_equal(there, decoded(cache, record))


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_side_is_part_of_the_key_and_the_size_of_the_cache_is_not() -> None:
    def identity(**fields: Any) -> dict[str, Any]:
        return Pretrain.model_validate(
            {"kind": "pretrain", "steps": 1, "batch_size": 16, "optimizer": _OPTIMIZER, **fields}
        ).identity()

    plain = identity()
    assert "cached_side" not in plain
    assert identity(image_cache_gib=2) == plain
    assert identity(cached_side=512) == {**plain, "cached_side": 512}
    assert identity(cached_side=512, image_cache_gib=2) == identity(cached_side=512)
