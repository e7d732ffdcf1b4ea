"""Pictures of other than three bands: read, cut into views, measured and shown."""

from __future__ import annotations

import sqlite3
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import DataSource
from orchestrator.data import decode
from orchestrator.data.bands import mean_and_std, moments, resized, shown_rgb
from orchestrator.data.crops import Box, cut, make_views
from orchestrator.data.curation import signatures
from orchestrator.data.curation.selection import filter_images
from orchestrator.data.curation.signatures import SignatureCache
from orchestrator.data.decode import UnreadableImage, read_header, read_rgb, read_square, upright_size
from orchestrator.data.index import ImageIndex, ImageRecord, pixels_in
from orchestrator.data.rng import generator
from orchestrator.data.sources.pixel_checks import unlike_pixels
from orchestrator.data.sources.scan import ScannedImage, scan
from orchestrator.data.tiff_bands import TiffHeader, tiff_header, tiff_values
from orchestrator.data.views import CropConfig
from tests.band_files import band_scene, write_tiff

SIX = PixelFormat(bands=(0, 1, 2, 3, 4, 5), range=(0, 4095))
VIEWS = CropConfig(global_size=16, local_size=8, num_local=2, blur_probability=(1.0, 1.0))


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("bands", [2, 5, 6, 8])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"order": ">", "rows": 7},
        {"deflate": True, "rows": 16},
        {"deflate": True, "predictor": True, "apart": True, "rows": 5},
        {"order": ">", "deflate": True, "predictor": True},
    ],
)
def test_a_tiff_of_any_bands_is_read_as_it_was_written(
    tmp_path: Path, kind: str, bands: int, layout: dict[str, Any]
) -> None:
    if kind == "f4" and layout.get("predictor"):
        layout = {**layout, "predictor": False}
    values = (band_scene(1, bands, side=21) - (500 if kind in ("i2", "f4") else 0)).astype(kind)

    data = write_tiff(tmp_path / "a.tif", values, **layout).read_bytes()
    header = tiff_header(data)

    assert header is not None
    assert header.bands == bands
    np.testing.assert_array_equal(tiff_values(data, header, 10**6), values)


def test_six_bands_are_seen_by_their_range(tmp_path: Path) -> None:
    raw = band_scene(2)
    path = write_tiff(tmp_path / "a.tif", raw, deflate=True, rows=9)

    seen = read_rgb(path, pixels=SIX)
    some = read_rgb(path, pixels=PixelFormat(bands=(5, 0), range=(0, 4095)))

    # To the rounding of float32.
    assert np.abs(seen - raw / 4095 * 65535).max() < 1
    np.testing.assert_array_equal(some, seen[:, :, [5, 0]])
    assert upright_size(path) == (48, 48)
    assert read_header(path).bits == 16


@pytest.mark.parametrize("bands", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_four_bands_of_a_png_are_not_red_green_blue_and_transparency(
    tmp_path: Path, bands: tuple[int, ...]
) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    raw[:10, :, 3] = 0
    Image.fromarray(raw, "RGBA").save(tmp_path / "a.png")

    pixels = PixelFormat(bands=bands)

    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png", pixels=pixels), raw[:, :, list(bands)])
    square = read_square(tmp_path / "a.png", 8, pixels=pixels)
    for channel, band in enumerate(bands):
        alone = read_square(tmp_path / "a.png", 8, pixels=PixelFormat(bands=(band,)))
        np.testing.assert_array_equal(square[:, :, channel], alone[:, :, 0])


@pytest.mark.parametrize("fourth", [-3.0, 900.0, np.nan])
def test_a_fourth_band_that_is_no_share_is_cut_off_as_transparency(tmp_path: Path, fourth: float) -> None:
    values = np.full((8, 8, 4), 0.5, np.float32)
    values[:, :, 3] = fourth
    path = write_tiff(tmp_path / "a.tif", values)

    seen = read_rgb(path, pixels=PixelFormat(range=(0, 1)))

    # What is transparent is white.
    assert set(seen.ravel()) == {128 if fourth > 1 else 255}


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", band_scene(0))
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(UnreadableImage, match="truncated") as caught:
        read_rgb(path, pixels=SIX)

    assert caught.value.kind == "damaged"


@pytest.mark.parametrize("start", [2**62, 2**63, 2**64 - 9])
def test_a_big_tiff_whose_tags_are_nowhere_is_damaged(tmp_path: Path, start: int) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"II+\0" + struct.pack("<HHQ", 8, 0, start) + bytes(64))

    for read in (read_rgb, read_header, upright_size):
        with pytest.raises(UnreadableImage):
            read(path)


def test_tags_that_all_name_the_whole_file_take_no_more_memory_than_it(tmp_path: Path) -> None:
    size, count = 100_000, 100
    # 50 unknown tags, and 50 times the tag of the strips; of bytes, which are a number each.
    tags = [*range(40000, 40000 + count // 2), *[273] * (count // 2)]
    entries = b"".join(struct.pack("<HHLL", tag, 1, size, 0) for tag in tags)
    data = (b"II*\0" + struct.pack("<LH", 8, count) + entries).ljust(size, b"\0")

    tracemalloc.start()
    try:
        header = tiff_header(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert header is not None
    assert header.tags.keys() == {273}
    assert peak < 20 * size


def test_a_small_file_that_claims_thousands_of_bands_is_too_large(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", band_scene(0), deflate=True)
    data = bytearray(path.read_bytes())
    for at in range(10, 10 + 12 * 13, 12):
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (256, 257, 277, 278):
            struct.pack_into("<HHLL", data, at, tag, 4, 1, 60_000 if tag == 277 else 5_000)
    path.write_bytes(data)

    for read in (read_rgb, read_header):
        with pytest.raises(UnreadableImage, match="pixels of 60,000 bands take") as caught:
            read(path)
        assert caught.value.kind == "too large"


def test_tiles_are_no_larger_than_pictures_may_be() -> None:
    tags = {256: 1, 257: 1, 258: 8, 277: 60_000, 322: 9_000, 323: 9_000, 324: 8, 325: 8, 259: 8}
    header = TiffHeader("<", {tag: (value,) for tag, value in tags.items()})

    with pytest.raises(ValueError, match="in tiles of 9000 × 9000 are too large"):
        tiff_values(bytes(99), header, 10**8)


def test_a_header_is_found_wherever_it_is_in_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "a.tif", band_scene(0))
    monkeypatch.setattr(decode, "_SMALL_FILE", 64)

    assert read_header(path).bits == 16
    assert upright_size(path) == (48, 48)
    assert read_rgb(path, pixels=SIX).shape == (48, 48, 6)


def test_a_file_that_lacks_a_band_is_left_out_for_that(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", band_scene(0, bands=5))

    with pytest.raises(UnreadableImage, match="it has 5 bands, and no band 5") as caught:
        read_rgb(path, pixels=SIX)
    with pytest.raises(UnreadableImage, match="name those to see"):
        read_rgb(path)

    assert caught.value.kind == "bands"


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [1, 2, 4, 6, 9])
@pytest.mark.parametrize("method", [cv2.INTER_AREA, cv2.INTER_CUBIC])
def test_each_band_is_resized_as_it_is_alone(kind: Any, bands: int, method: int) -> None:
    image = band_scene(3, bands, side=50, white=200).astype(kind)[:40]

    made = resized(image, 16, method)

    assert made.dtype == kind
    for band in range(bands):
        alone = cv2.resize(np.ascontiguousarray(image[:, :, band]), (16, 16), interpolation=method)
        # OpenCV's arithmetic depends on how many there are by the last level.
        assert np.abs(made[:, :, band].astype(int) - alone).max() <= 1


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [2, 4, 5, 9])
@pytest.mark.parametrize("size", [6, 16, 30, 50])
def test_each_band_of_a_crop_is_cut_as_it_is_alone(kind: Any, bands: int, size: int) -> None:
    image = band_scene(5, bands, side=50, white=250).astype(kind)

    for flip in (False, True):
        box = Box(3, 4, 40, 35, flip)
        made = cut(image, box, size)

        assert made.shape == (size, size, bands)
        assert made.dtype == kind
        for band in range(bands):
            alone = cut(np.ascontiguousarray(image[:, :, [band] * 3]), box, size)[:, :, 0]
            assert np.abs(made[:, :, band].astype(int) - alone).max() <= 1


def test_views_hold_the_bands_in_their_order() -> None:
    still = {"jitter_probability": 0.0, "solarize_probability": 0.0, "blur_probability": (0.0, 0.0)}
    config = VIEWS.model_copy(update={**still, "local_blur_probability": 0.0})
    image = np.broadcast_to(np.arange(6, dtype=np.uint8) * 40, (40, 40, 6)).copy()

    made = make_views(image, config, _rng, is_colour=False)

    for part in ("globals", "locals"):
        values = made[part].transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(values, np.broadcast_to(image[0, 0], values.shape))


def _rng(view: int) -> np.random.Generator:
    return generator(0, "crop", view)


def test_a_band_of_a_view_is_the_same_whatever_bands_are_beside_it() -> None:
    # No contrast, which is around the mean of all bands.
    config = VIEWS.model_copy(update={"contrast": 0.0})
    image = band_scene(4).astype(np.uint16) * 16

    six = make_views(image, config, _rng, is_colour=False)
    two = make_views(np.ascontiguousarray(image[:, :, [4, 1]]), config, _rng, is_colour=False)

    assert six["globals"].shape == (2, 6, 16, 16)
    assert six["locals"].shape == (2, 6, 8, 8)
    for part in ("globals", "locals"):
        assert np.abs(six[part][:, [4, 1]].astype(int) - two[part]).max() <= 2


def test_brightness_and_contrast_are_one_for_all_bands_and_colours_are_left_alone() -> None:
    # Of one value a band, so that every view shows what becomes of these.
    bands = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    image = np.broadcast_to(np.rint(bands * 65535), (32, 32, 6)).astype(np.uint16)
    plain = {"solarize_probability": 0.0, "jitter_probability": 1.0, "gray_probability": 1.0, "hue": 0.5}
    config = VIEWS.model_copy(update={**plain, "saturation": 1.0})

    seen = make_views(image, config, _rng, is_colour=False)["globals"][:, :, 8, 8] / 65535

    for view in seen:
        # v → a · v + b with the same a and b for each band, unless it is cut off at black or white.
        inside = (view > 0) & (view < 1)
        slope, offset = np.polyfit(bands[inside], view[inside], 1)
        np.testing.assert_allclose(slope * bands[inside] + offset, view[inside], atol=1e-4)
        assert inside.sum() >= 3
    assert np.abs(seen - bands).max() > 0.01


def test_mean_and_deviation_are_those_of_all_values_of_pictures_that_count_the_same() -> None:
    pictures = [band_scene(seed, side=30) * 16 for seed in range(5)]

    mean, std = mean_and_std(moments(picture) for picture in pictures)

    together = np.stack(pictures).astype(np.float64).reshape(-1, 6) / 65535
    np.testing.assert_allclose(mean, together.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(std, together.std(axis=0), atol=1e-6)
    flat = np.full((4, 4, 2), 255, np.uint8)
    assert mean_and_std([moments(flat)]) == ((1.0, 1.0), (1.0, 1.0))


def test_three_of_the_bands_are_shown() -> None:
    image = band_scene(0) * 16
    eight = np.rint(image / 65535 * 255)

    for pixels, shown in (
        (SIX, [0, 1, 2]),
        (PixelFormat(bands=(7, 3, 2, 1, 0, 5), shown=(3, 2, 1)), [1, 2, 3]),
        (None, [0, 1, 2]),
    ):
        np.testing.assert_array_equal(shown_rgb(image, pixels), eight[:, :, shown])
    two = PixelFormat(bands=(1, 4))
    np.testing.assert_array_equal(shown_rgb(image[:, :, :2], two), eight[:, :, [0, 0, 0]])


def test_curation_compares_all_bands_and_measures_them(tmp_path: Path) -> None:
    """Two pictures that differ in one band alone are two, though they are shown alike."""
    first = band_scene(0)
    other = first.copy()
    other[:, :, 5] = 4095 - other[:, :, 5]
    for name, values in (("a.tif", first), ("b.tif", other), ("c.tif", first)):
        write_tiff(tmp_path / name, values, rows=9 if name == "c.tif" else None)
    source = DataSource(path=tmp_path, pixels=SIX)
    told: list[Any] = []

    statuses, _ = filter_images(
        scan(source, "scenes"),
        {"scenes": tmp_path},
        1.0,
        None,
        lambda: None,
        pixels={"scenes": SIX},
        on_moments=told.extend,
    )

    assert [status.status for status in statuses] == ["unique", "unique", "duplicate"]
    mean, std = mean_and_std(told)
    values = np.stack([first, other]).reshape(-1, 6) / 4095
    np.testing.assert_allclose(mean, values.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(std, values.std(axis=0), atol=1e-5)
    assert isinstance(statuses[0].photo, ScannedImage)


def test_what_is_remembered_of_pictures_has_their_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    seen, digest = band_scene(0) * 16, "0a" * 32
    first = SignatureCache(10**6, SIX)
    first.note(digest, seen, 9, 0)
    first.save()

    later, other = (
        SignatureCache(10**6, SIX),
        SignatureCache(10**6, SIX.model_copy(update={"shown": (5, 3, 1)})),
    )
    later.load([digest])
    other.load([digest])

    found = later.find(digest)
    assert found is not None
    assert found.moments is not None
    np.testing.assert_array_equal(found.moments, moments(seen))
    small = cv2.resize(
        np.ascontiguousarray(seen[:, :, 5]).astype(np.float64), (32, 32), interpolation=cv2.INTER_AREA
    )
    assert np.abs(found.thumbnail.reshape(32, 32, 6)[:, :, 5] - small / 257).max() <= 1
    # Its descriptor is of the bands that are shown.
    assert other.find(digest) is None
    # Without moments it has to be decoded again.
    with sqlite3.connect(tmp_path / signatures.FILE) as database:
        database.execute("DELETE FROM moments")
    lacking = SignatureCache(10**6, SIX)
    lacking.load([digest])
    assert lacking.find(digest) is None


def test_the_index_says_how_many_channels_there_are(tmp_path: Path) -> None:
    row = ImageRecord("scenes", "a.tif", str(tmp_path), "0" * 64, 48, 48)

    ImageIndex([row], {"scenes": SIX}).save(tmp_path)
    found = ImageIndex.load(tmp_path)

    assert found.num_channels == 6
    assert pixels_in(tmp_path) == SIX
    assert ImageIndex([row]).num_channels == 3


def test_what_bands_shown_and_means_must_fit() -> None:
    assert PixelFormat(bands=(0,)).num_channels == 3
    assert PixelFormat(bands=(3, 1)).num_channels == 2
    with pytest.raises(ValidationError, match="mean has 3 numbers, and models see 6 channels"):
        PixelFormat(bands=range(6), mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValidationError, match="shown is"):
        PixelFormat(bands=(0, 1, 2, 3), shown=(2, 1, 7))
    # Keys of what was there before stay.
    assert SIX.record() == {"bands": [0, 1, 2, 3, 4, 5], "range": [0.0, 4095.0], "mean": None, "std": None}


def test_datasets_of_unlike_numbers_of_bands_are_not_trained_on_together(tmp_path: Path) -> None:
    sources = {
        "six": DataSource(path=tmp_path, pixels=SIX),
        "four": DataSource(path=tmp_path, pixels=PixelFormat(bands=(0, 1, 2, 3), range=(0, 4095))),
        "same": DataSource(path=tmp_path, pixels=PixelFormat(bands=(7, 1, 2, 3, 4, 5), range=(0, 4095))),
    }

    error = unlike_pixels(sources, ["six", "four"])

    assert error is not None
    assert "differ in the number of bands" in error.what
    assert unlike_pixels(sources, ["six", "same"]) is None
