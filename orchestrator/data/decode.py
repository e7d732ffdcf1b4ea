"""Image files to RGB pixels: upright, eight bits, three channels, whatever the file is."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

_EXIF_ORIENTATION = 0x0112
_BENIGN_JPEG = re.compile(r"extraneous bytes|unsupported|colorspace", re.IGNORECASE)


class UnreadableImage(Exception):  # noqa: N818 (it names a state of a file)
    """A file that is not an image, or not a whole one."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.reason)


def read_rgb(path: Path | str, min_side: int | None = None) -> NDArray[np.uint8]:
    """The pixels of an image file.

    Transparency is composited on white, 16-bit values keep their high byte, EXIF orientation is applied and
    animations give their first frame.

    Args:
        path: the file.
        min_side: large JPEGs may be decoded at 1/2, 1/4 or 1/8 as long as both sides stay at least this many
            pixels (several times faster); other formats ignore it.

    Returns:
        (H, W, 3) uint8, RGB, contiguous.

    Raises:
        UnreadableImage: missing, not an image, truncated or corrupt.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from error
    return decode_rgb(data, path, min_side)


def decode_rgb(data: bytes, path: Path | str, min_side: int | None = None) -> NDArray[np.uint8]:
    """Like :func:`read_rgb` for the bytes of a file; `path` is for the error message."""
    if not data:
        raise UnreadableImage(path, "the file is empty")
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data, path, min_side)
        if pixels is not None:
            return pixels
    return _decode_any(data, path)


def _decode_jpeg(data: bytes, path: Path | str, min_side: int | None) -> NDArray[np.uint8] | None:
    """The pixels, or None where Pillow has to do it (CMYK, harmless stray bytes)."""
    try:
        # A DCT scale below 1 is chosen only if the result still reaches both minima.
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK"):
            return None
        fits = min_side is not None and min(height, width) >= min_side
        side = min_side if fits and min_side is not None else 0
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=side or height, min_width=side or width
        )
    except ValueError as error:
        if _BENIGN_JPEG.search(str(error)):
            return None
        raise UnreadableImage(path, f"corrupt JPEG: {error}") from error
    return _upright(pixels, _orientation(data))


def _orientation(data: bytes) -> int:
    if b"Exif\0" not in data[:65536]:
        return 1
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # malformed metadata must not cost a good picture
        return 1


def _upright(pixels_HWC: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """EXIF 2.32, tag 274: what the 0th row and column show."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return np.ascontiguousarray(pixels_HWC)


def _decode_any(data: bytes, path: Path | str) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            # Pictures between one and two times Pillow's bomb limit are legal; beyond, it raises.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), path)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "not an image of a known format") from error
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        raise UnreadableImage(path, str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image, path: Path | str) -> NDArray[np.uint8]:
    if image.mode == "F":
        raise UnreadableImage(path, "floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        narrow = (wide if wide.max(initial=0) < 256 else wide >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(narrow[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), dtype=np.uint8, order="C")
