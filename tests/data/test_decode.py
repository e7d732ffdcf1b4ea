"""Decoding: every kind of file to the same upright RGB, and bad files to one error."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from orchestrator.data import decode
from orchestrator.data.decode import UnreadableImage, read_rgb, use_rgb


def _smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 127 + 60 * np.sin(x / 9)], axis=2).astype(np.uint8)


def test_jpeg_equals_pillow(tmp_path: Path) -> None:
    Image.fromarray(_smooth(61, 83)).save(tmp_path / "a.jpg", quality=90)
    pixels = read_rgb(tmp_path / "a.jpg")
    assert pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(_smooth(40, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")))
    pixels = read_rgb(tmp_path / "a.jpg")
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 2


def test_large_jpegs_are_decoded_small_but_never_too_small(tmp_path: Path) -> None:
    original = _smooth(640, 960)
    Image.fromarray(original).save(tmp_path / "a.jpg", quality=95)
    small = read_rgb(tmp_path / "a.jpg", min_side=150)
    assert 150 <= min(small.shape[:2]) < 640
    expected = np.asarray(Image.fromarray(original).resize(small.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small.astype(int) - expected.astype(int)).mean() < 2
    assert read_rgb(tmp_path / "a.jpg", min_side=2000).shape == (640, 960, 3)
    assert read_rgb(tmp_path / "a.jpg", min_side=640).shape == (640, 960, 3)


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 0, 0, 255)
    pixels[0, 1] = (200, 0, 0, 0)
    pixels[1, 0] = (0, 0, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rgb = read_rgb(tmp_path / "a.png")
    assert rgb[0, 0].tolist() == [200, 0, 0]
    assert rgb[0, 1].tolist() == [255, 255, 255]
    assert np.allclose(rgb[1, 0], 127, atol=1)


def test_palette_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_rgb(tmp_path / "a.png")[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png")[0, :, 1].tolist() == [0, 1, 255]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(_smooth(16, 16)).convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(read_rgb(path), expected)


def test_grey_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.fromarray(_smooth(16, 24)).convert("L").save(tmp_path / "a.jpg")
    assert read_rgb(tmp_path / "a.jpg").shape == (16, 24, 3)


def test_stray_bytes_do_not_cost_a_picture(tmp_path: Path) -> None:
    Image.fromarray(_smooth(32, 32)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data[:-2] + b"\x00\x01\x02" + data[-2:])
    assert np.array_equal(read_rgb(tmp_path / "a.jpg"), read_rgb(tmp_path / "b.jpg"))


def test_unreadable_files(tmp_path: Path) -> None:
    Image.fromarray(_smooth(64, 64)).save(tmp_path / "whole.jpg", quality=95)
    Image.fromarray(_smooth(64, 64)).save(tmp_path / "whole.png")
    for name in ("whole.jpg", "whole.png"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"half-{name}").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is not a picture")
    expected = {
        "half-whole.jpg": "corrupt JPEG",
        "half-whole.png": "",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image",
        "missing.jpg": "No such file",
    }
    for name, reason in expected.items():
        with pytest.raises(UnreadableImage) as raised:
            read_rgb(tmp_path / name)
        assert reason in raised.value.reason
        assert raised.value.path == tmp_path / name


@pytest.mark.parametrize("is_large", [False, True])
def test_trouble_of_whoever_uses_a_picture_is_not_the_pictures(
    tmp_path: Path, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr(decode, "_SMALL_FILE", 10)
    Image.fromarray(_smooth(8, 8)).save(tmp_path / "a.png")

    def use(pixels: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with pytest.raises(OSError, match="no space left"):
        use_rgb(tmp_path / "a.png", use)
    with pytest.raises(OSError, match="no space left"):
        use_rgb(tmp_path / "a.png", lambda pixels: pixels, on_bytes=use)  # type: ignore[arg-type]


def test_the_error_survives_a_process_boundary() -> None:
    copy = pickle.loads(pickle.dumps(UnreadableImage(Path("a/b.jpg"), "corrupt")))
    assert (copy.path, copy.reason) == (Path("a/b.jpg"), "corrupt")
