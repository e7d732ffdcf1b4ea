"""What a model sees of the values in files: by the dataset's rule, never by what happens to be in one file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import DataSource
from orchestrator.data import deep_colours
from orchestrator.data.bands import as_8_bits
from orchestrator.data.blocks import CaptionBlocks, CropBlocks
from orchestrator.data.crops import make_views
from orchestrator.data.decode import UnreadableImage, read_rgb, read_square, rgb_of
from orchestrator.data.index import ImageIndex, ImageRecord, pixels_in
from orchestrator.data.rng import generator
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.sources.account import BANDS, DAMAGED
from orchestrator.data.sources.folder import fingerprint
from orchestrator.data.sources.pixel_checks import unclear_range, unlike_pixels
from orchestrator.data.sources.scan import scan
from orchestrator.data.views import CropConfig
from tests.band_files import write_tiff

TWELVE = PixelFormat(range=(0, 4095))


def _radiograph(seed: int = 0) -> NDArray[np.uint16]:
    """A real photograph's luminance as 12-bit values, with noise below one of its 8-bit levels: (427, 640)."""
    grey = cv2.cvtColor(load_sample_image("flower.jpg"), cv2.COLOR_RGB2GRAY).astype(float)
    noise = np.random.default_rng(seed).uniform(0, 16, grey.shape)
    return np.asarray((16 * grey + noise).clip(0, 4095), np.uint16)


def _tiff(values: NDArray[Any], path: Path) -> None:
    """An uncompressed TIFF of any number of bands, by the standard (TIFF 6.0), which no library here writes."""
    values = values if values.ndim == 3 else values[..., None]
    height, width, bands = values.shape
    data, bits = values.astype(values.dtype.newbyteorder("<")).tobytes(), values.dtype.itemsize * 8
    form = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    bits_at = 8 + len(data)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, bands, bits if bands == 1 else bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2 if bands >= 3 else 1),
        (273, 4, 1, 8),
        (277, 3, 1, bands),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, 1),
    ]
    if bands > 3:
        entries.append((338, 3, 1, 0))
    entries.append((339, 3, 1, form))
    listed = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    tail = struct.pack(f"<{bands}H", *[bits] * bands) if bands > 1 else b""
    at = 8 + len(data) + len(tail)
    path.write_bytes(
        struct.pack("<2sHI", b"II", 42, at)
        + data
        + tail
        + struct.pack("<H", len(entries))
        + listed
        + bytes(4)
    )


def _expected(values: NDArray[Any], low: float, high: float, white: int = 65535) -> NDArray[Any]:
    """The formula, in float64."""
    shares = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return np.rint(shares * white)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_twelve_bits_keep_their_grey_levels(tmp_path: Path, ending: str) -> None:
    raw = _radiograph()
    path = tmp_path / f"a.{ending}"
    assert cv2.imwrite(str(path), raw)
    seen = read_rgb(path, pixels=TWELVE)
    assert (seen.dtype, seen.shape) == (np.uint16, (*raw.shape, 3))
    assert len(np.unique(seen)) == len(np.unique(raw)) > 3000
    assert np.abs(seen[..., 1].astype(float) - _expected(raw, 0, 4095)).max() <= 1
    assert np.abs(as_8_bits(seen)[..., 0].astype(float) - _expected(raw, 0, 4095, 255)).max() <= 1
    with Image.open(path) as image:
        assert np.array_equal(rgb_of(image, TWELVE), seen)


def test_no_file_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """The same value is the same pixel, whatever else is in its file."""
    dark, bright = np.full((8, 8), 40, np.uint16), np.full((8, 8), 40, np.uint16)
    bright[0, 0] = 4000
    for name, raw in (("dark", dark), ("bright", bright)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), raw)
    for pixels in (None, TWELVE, PixelFormat(range=(0, 255))):
        found = [read_rgb(tmp_path / f"{name}.png", pixels=pixels)[4, 4, 0] for name in ("dark", "bright")]
        assert found[0] == found[1]


def test_a_range_cuts_off_and_fractions_have_one_only_by_the_rule(tmp_path: Path) -> None:
    values = np.linspace(-2, 3, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0] = np.nan
    _tiff(values, tmp_path / "f.tif")
    with pytest.raises(UnreadableImage, match="no defined range") as caught:
        read_rgb(tmp_path / "f.tif")
    assert caught.value.kind == "bands"
    seen = read_rgb(tmp_path / "f.tif", pixels=PixelFormat(range=(-1, 2)))
    assert np.abs(seen[..., 2].astype(float) - _expected(np.nan_to_num(values, nan=-1), -1, 2)).max() <= 1


def test_a_jpeg_has_the_range_of_its_dataset(tmp_path: Path) -> None:
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "a.jpg")
    plain = read_rgb(tmp_path / "a.jpg")
    seen = read_rgb(tmp_path / "a.jpg", pixels=PixelFormat(range=(16, 235), bands=(2, 1, 0)))
    assert seen.dtype == np.uint8
    assert np.abs(seen.astype(float) - _expected(plain[..., ::-1], 16, 235, 255)).max() <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_four_bands_are_not_transparency(tmp_path: Path, kind: type) -> None:
    raw: Any = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (16, 24, 4)).astype(kind)
    _tiff(raw, tmp_path / "s.tif")
    pixels = PixelFormat(bands=(3, 0, 1), range=(0, np.iinfo(kind).max))
    seen = read_rgb(tmp_path / "s.tif", pixels=pixels)
    assert np.array_equal(seen, raw[..., [3, 0, 1]])
    assert not pixels.is_colour
    one = read_rgb(tmp_path / "s.tif", pixels=PixelFormat(bands=(3,)))
    high = raw if kind is np.uint8 else raw >> 8
    assert np.array_equal(one, np.repeat(high[..., 3:], 3, axis=2))
    with pytest.raises(UnreadableImage, match="4 bands, and no band 4") as caught:
        read_rgb(tmp_path / "s.tif", pixels=PixelFormat(bands=(4,)))
    assert caught.value.kind == "bands"


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_colours_are_not_cut_to_eight(tmp_path: Path, ending: str) -> None:
    raw = np.random.default_rng(1).integers(0, 4096, (12, 20, 3)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"c.{ending}"), raw[..., ::-1])
    seen = read_rgb(tmp_path / f"c.{ending}", pixels=TWELVE)
    assert np.abs(seen.astype(float) - _expected(raw, 0, 4095)).max() <= 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bands": ()}, "at least 1"),
        ({"bands": (0, 1), "std": (0.1, 0.1, 0.1)}, "std has 3 numbers, and models see 2 channels"),
        ({"range": (5, 5)}, "black first"),
        ({"range": (0, float("nan"))}, "finite"),
        ({"std": (0.1, 0.1, 0)}, "greater than 0"),
        ({"bands": (-1,)}, "greater than or equal to 0"),
    ],
)
def test_wrong_formats_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PixelFormat(**wrong)


def test_a_square_of_sixteen_bits_is_that_of_eight_but_finer(tmp_path: Path) -> None:
    raw = load_sample_image("china.jpg")
    wide = raw.astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "w.png"), wide[..., ::-1])
    Image.fromarray(raw).save(tmp_path / "n.png")
    fine = read_square(tmp_path / "w.png", 64, pixels=PixelFormat(range=(0, 65535)))
    coarse = read_square(tmp_path / "n.png", 64)
    assert np.abs(fine / 257 - coarse).max() <= 1
    assert len(np.unique(fine)) > 2000


# --- crops ----------------------------------------------------------------------------------------------------------


def test_views_of_sixteen_bits_are_those_of_eight_but_finer() -> None:
    """The same boxes and the same draws; what differs is rounding, and hue in 8 bits (9 of 255 levels)."""
    raw = load_sample_image("china.jpg")
    config = CropConfig(global_size=64, local_size=32, num_local=3, flip=True)
    narrow = make_views(raw, config, lambda view: generator(5, view))
    wide = make_views(raw.astype(np.uint16) * 257, config, lambda view: generator(5, view))
    for name, views in narrow.items():
        assert wide[name].dtype == np.uint16
        difference = np.abs(wide[name] / 257 - views.astype(float))
        # Solarized pixels near the middle may fall on either side of it.
        assert np.quantile(difference, 0.99) < 12
        assert difference.mean() < 2.5


def test_bands_that_are_no_colours_are_not_turned_or_greyed() -> None:
    image = np.random.default_rng(0).integers(0, 65535, (32, 32, 3)).astype(np.uint16)
    only_colours = CropConfig(
        jitter_probability=1, brightness=0, contrast=0, saturation=1, hue=0.5, gray_probability=1
    )
    kept = deep_colours.distort(image, only_colours, 0, 0, generator(1), is_colour=False)
    assert np.array_equal(kept, image)
    changed = deep_colours.distort(image, only_colours, 0, 0, generator(1), is_colour=True)
    assert np.ptp(changed.astype(int), axis=2).max() <= 1


def test_brightness_and_contrast_are_the_formulas() -> None:
    image = np.random.default_rng(0).integers(0, 65535, (32, 32, 3)).astype(np.uint16)
    config = CropConfig(
        jitter_probability=1, brightness=0.4, contrast=0, saturation=0, hue=0, gray_probability=0
    )
    rng = generator(3)
    rng.random(4)
    factor = 1 + 0.4 * rng.uniform(-1, 1)
    seen = deep_colours.distort(image, config, 0, 0, generator(3), is_colour=False)
    assert np.abs(seen - (image.astype(np.float64) * factor).clip(0, 65535)).max() <= 1


# --- through the index ----------------------------------------------------------------------------------------------


def _index(folder: Path, pixels: PixelFormat | None) -> ImageIndex:
    rows = []
    for number in range(6):
        name = f"{number}.png"
        cv2.imwrite(str(folder / name), _radiograph(number)[number : number + 200, :300])
        rows.append(ImageRecord("x", name, str(folder), "0" * 64, 300, 200, caption="a flower"))
    return ImageIndex(rows, {"x": pixels})


def test_blocks_have_what_the_index_says(tmp_path: Path) -> None:
    pixels = TWELVE.model_copy(update={"mean": (0.3, 0.3, 0.3), "std": (0.1, 0.1, 0.1)})
    _index(tmp_path, pixels).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    assert index.is_deep
    assert index.pixels(0) == pixels == pixels_in(tmp_path)
    order = SampleOrder({"all": np.arange(6)}, batch_size=2, seed=0)
    config = CropConfig(global_size=32, local_size=16, num_local=2)
    blocks = CropBlocks(
        index, order, lambda step: config, patch_size=16, block_size=2, seed=0, max_unreadable=0
    )
    arrays = blocks.load(0, 0).arrays
    assert {arrays[name].dtype for name in ("globals", "locals")} == {np.dtype(np.uint16)}
    assert len(np.unique(arrays["globals"])) > 256
    texts = CaptionBlocks(
        index, order, size=32, block_size=2, seed=0, max_unreadable=0, encode=lambda text: [1, 2], context=4
    )
    assert texts.load(0, 0).arrays["images"].dtype == np.uint16


def test_views_like_those_of_another_size_need_no_range_of_their_own(tmp_path: Path) -> None:
    """Fractions are pictures by the rule of their dataset alone, also where only their size is asked for."""
    rows = []
    for number in range(2):
        values = np.random.default_rng(number).random((200, 300), dtype=np.float32)
        Image.fromarray(values).save(tmp_path / f"{number}.tif")
        rows.append(ImageRecord("x", f"{number}.tif", str(tmp_path), "0" * 64, 300, 200))
    index = ImageIndex(rows, {"x": PixelFormat(range=(0, 1))})
    small, large = (CropConfig(global_size=size, local_size=16, num_local=2) for size in (32, 64))
    order = SampleOrder({"all": np.arange(2)}, batch_size=2, seed=0)
    blocks = CropBlocks(
        index, order, lambda step: large, patch_size=16, block_size=2, seed=0, max_unreadable=0, like=small
    )
    block = blocks.load(0, 0)
    assert len(block.unreadable) == 0
    assert block.arrays["globals"].shape == (2, 2, 3, 64, 64)


def test_an_index_of_before_has_no_pixels(tmp_path: Path) -> None:
    _index(tmp_path, None).save(tmp_path)
    assert pixels_in(tmp_path) is None
    assert not ImageIndex.load(tmp_path).is_deep


# --- questions ------------------------------------------------------------------------------------------------------


def test_a_dataset_that_uses_a_small_part_of_its_bits_is_asked_about(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), _radiograph())
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "b.jpg")
    photos = scan(DataSource(path=tmp_path), "x")
    error = unclear_range("x", [photo.peak for photo in photos])
    assert error is not None
    assert "range: [0, 4095]" in (error.hint or "")
    told = scan(DataSource(path=tmp_path, pixels=TWELVE), "x")
    assert unclear_range("x", [photo.peak for photo in told]) is None
    assert unclear_range("x", [0, 40000, 12]) is None


def test_the_format_is_part_of_the_key_and_its_default_is_not(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), _radiograph())
    prints = {
        fingerprint(DataSource(path=tmp_path, pixels=pixels))
        for pixels in (None, TWELVE, PixelFormat(bands=(0,)), TWELVE.model_copy(update={"mean": (0, 0, 0)}))
    }
    assert len(prints) == 4


def test_datasets_of_one_index_are_seen_alike(tmp_path: Path) -> None:
    plain = DataSource(path=tmp_path)
    sources = {
        "a": plain,
        "b": DataSource(path=tmp_path, pixels=TWELVE),
        "c": DataSource(path=tmp_path, pixels=PixelFormat(range=(0, 100))),
        "d": DataSource(path=tmp_path, pixels=PixelFormat(std=(1, 1, 1))),
    }
    assert unlike_pixels(sources, ["a", "c"]) is None
    assert "bits" in str(unlike_pixels(sources, ["a", "b"]))
    assert "the deviation" in str(unlike_pixels(sources, ["a", "d"]))
    assert json.loads(TWELVE.model_dump_json())["range"] == [0, 4095]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((8, 8, 3), np.nan, np.float32), "none of its values is a number"),
        (np.full((8, 8, 3), np.inf, np.float32), "none of its values is a number"),
        (np.full((8, 8, 3), -1024, np.int16), "-1024 to -1024, are all outside of the `range` 0 to 4095"),
        (np.full((8, 8, 3), 4096, np.int16), "4096 to 4096, are all outside of the `range` 0 to 4095"),
        (
            np.full((8, 8, 3), 4095.5, np.float32),
            "4095.5 to 4095.5, are all outside of the `range` 0 to 4095",
        ),
    ],
)
def test_a_picture_that_would_be_one_colour_only_by_its_range_is_left_out(
    tmp_path: Path, values: NDArray[Any], said: str
) -> None:
    write_tiff(tmp_path / "a.tif", values)
    with pytest.raises(UnreadableImage, match=said) as caught:
        read_rgb(tmp_path / "a.tif", pixels=TWELVE)
    assert caught.value.kind == (DAMAGED if "number" in said else BANDS)


@pytest.mark.parametrize("value", [0, 4095, -1024])
def test_one_value_that_can_be_seen_is_enough(tmp_path: Path, value: int) -> None:
    values = np.full((8, 8, 3), value, np.int16)
    if value < 0:
        values[0, 0] = 4095
    write_tiff(tmp_path / "a.tif", values)
    seen = read_rgb(tmp_path / "a.tif", pixels=TWELVE)
    assert seen.max() == (0 if value == 0 else 65535)
    some = np.full((8, 8, 3), np.nan, np.float32)
    some[0, 0] = 4095
    write_tiff(tmp_path / "b.tif", some)
    assert set(read_rgb(tmp_path / "b.tif", pixels=TWELVE).ravel()) == {0, 65535}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (np.int16, "signed pixels of 16 bits have no defined range"),
        (np.int32, "pixels of 32 bits have no defined range"),
        (np.uint32, "pixels of 32 bits have no defined range"),
        (np.float32, "floating-point pixels have no defined range"),
    ],
)
def test_values_of_no_known_range_are_named(tmp_path: Path, kind: type[np.generic], said: str) -> None:
    write_tiff(tmp_path / "a.tif", np.ones((8, 8, 3), kind))
    with pytest.raises(UnreadableImage, match=f"^.*: {said}") as caught:
        read_rgb(tmp_path / "a.tif")
    assert caught.value.kind == BANDS
