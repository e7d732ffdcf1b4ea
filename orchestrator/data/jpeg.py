"""JPEGs by libjpeg-turbo: at a smaller scale where that is enough, and upright."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from orchestrator.data.image_formats import UnreadableImage

# The tag of EXIF that says how a picture is turned.
EXIF_ORIENTATION = 0x0112
# What libjpeg-turbo says of files that Pillow decodes without loss.
BENIGN_JPEG = re.compile(r"extraneous bytes|unsupported|colorspace", re.IGNORECASE)


def decode_jpeg(data: bytes, path: Path | str, min_side: int | None) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG, upright, or None where Pillow has to decode it (CMYK, harmless stray bytes).

    Args:
        min_side: it may be decoded at 1/2, 1/4 or 1/8 as long as both sides stay at least this many pixels.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        UnreadableImage: it is truncated or corrupt.
    """
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
        if BENIGN_JPEG.search(str(error)):
            return None
        raise UnreadableImage(path, f"corrupt JPEG: {error}") from error
    return upright(pixels, _orientation(data))


def _orientation(data: bytes) -> int:
    if b"Exif\0" not in data[:65536]:
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # malformed metadata must not cost a good picture
        return 1


def upright(pixels_HWC: NDArray[Any], orientation: int) -> NDArray[Any]:
    """EXIF 2.32, tag 274: what the 0th row and column show."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels_HWC = pixels_HWC[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return np.ascontiguousarray(pixels_HWC)
