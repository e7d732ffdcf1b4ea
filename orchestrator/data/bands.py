"""Pictures of any number of bands: seen by a dataset's rule, resized, measured, and shown in three of them.

OpenCV and Pillow resize up to four bands at once, so that more go through them in groups. Bands do not mix in that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.image_formats import UnreadableImage
from orchestrator.data.sources.account import BANDS, DAMAGED

Pixels = NDArray[np.uint8]

_AT_ONCE = 4
_DIGITS = 6


def seen(
    raw_HWC: NDArray[Any],
    pixels: PixelFormat | None,
    path: Path | str,
    on_wide: Callable[[int], None] = lambda peak: None,
) -> Pixels:
    """What a model sees of the values of a file: its channels, by the dataset's rule alone.

    Args:
        raw_HWC: the values in the file, (H, W) or (H, W, bands), whole numbers or fractions.
        pixels: the rule; None for 8 bits, or the high byte of 16.
        path: for the error message.
        on_wide: see :func:`orchestrator.data.decode.use_rgb`.

    Raises:
        UnreadableImage: it lacks a band, its values have no defined range, or all lie outside of it.
    """
    raw_HWC = raw_HWC[:, :, None] if raw_HWC.ndim == 2 else raw_HWC
    values_HWC, alpha_HW1 = _bands(raw_HWC, pixels, path)
    if pixels is None or pixels.range is None:
        if values_HWC.dtype not in (np.uint8, np.uint16):
            what = _wide(values_HWC.dtype)
            raise UnreadableImage(path, f"{what} have no defined range: set `range` in `pixels`", BANDS)
        if values_HWC.dtype == np.uint16:
            on_wide(int(values_HWC.max(initial=0)))
        black, white = 0.0, float(np.iinfo(values_HWC.dtype).max)
    else:
        black, white = pixels.range
        _check_inside(values_HWC, black, white, path)
    if values_HWC.dtype == np.uint8 and (black, white) == (0, 255) and alpha_HW1 is None:
        made = values_HWC
    elif (pixels is None or pixels.range is None) and alpha_HW1 is None:
        made = (values_HWC >> 8).astype(np.uint8)
    else:
        made = _scaled(values_HWC, black, white, alpha_HW1, deep=pixels is not None and pixels.is_deep)
    return np.ascontiguousarray(np.repeat(made, 3, axis=2) if made.shape[2] == 1 else made)


def _wide(kind: np.dtype[Any]) -> str:
    """What to call values of a type whose range nobody knows."""
    if kind.kind == "f":
        return "floating-point pixels"
    signed = "signed " if kind.kind == "i" and kind.itemsize < 4 else ""
    return f"{signed}pixels of {8 * kind.itemsize} bits"


def _check_inside(values_HWC: NDArray[Any], black: float, white: float, path: Path | str) -> None:
    """See that a picture is not black or white all over because none of its values can be seen.

    Raises:
        UnreadableImage: none of its values is a number, or all lie below `black` or all above `white`.
    """
    if values_HWC.dtype.kind == "f":
        values_HWC = values_HWC[np.isfinite(values_HWC)]
        if not values_HWC.size:
            raise UnreadableImage(path, "none of its values is a number", DAMAGED)
    if not values_HWC.size:
        return
    low, high = values_HWC.min(), values_HWC.max()
    if high < black or low > white:
        what = f"its values, {low:g} to {high:g}, are all outside of the `range` {black:g} to {white:g} of `pixels`"
        raise UnreadableImage(path, what, BANDS)


def _bands(
    raw_HWC: NDArray[Any], pixels: PixelFormat | None, path: Path | str
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The bands that are seen, and what is transparent unless bands are named."""
    count = raw_HWC.shape[2]
    if pixels is not None and pixels.bands is not None:
        if max(pixels.bands) >= count:
            what = f"it has {count} {'band' if count == 1 else 'bands'}, and no band {max(pixels.bands)}"
            raise UnreadableImage(path, what, BANDS)
        return raw_HWC[:, :, list(pixels.bands)], None
    if count in (2, 4):
        return raw_HWC[:, :, :-1], raw_HWC[:, :, -1:]
    if count not in (1, 3):
        raise UnreadableImage(path, f"it has {count} bands: name those to see as `bands` of `pixels`", BANDS)
    return raw_HWC, None


def _scaled(
    values_HWC: NDArray[Any], black: float, white: float, alpha_HW1: NDArray[Any] | None, *, deep: bool
) -> NDArray[Any]:
    shares_HWC = (values_HWC.astype(np.float32) - np.float32(black)) * np.float32(1 / (white - black))
    # Of no value, as where a satellite saw nothing, there is black.
    np.nan_to_num(shares_HWC, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
    np.clip(shares_HWC, 0, 1, out=shares_HWC)
    if alpha_HW1 is not None:
        opaque = np.iinfo(alpha_HW1.dtype).max if alpha_HW1.dtype.kind in "ui" else 1.0
        alpha = np.nan_to_num(alpha_HW1.astype(np.float32) / np.float32(opaque)).clip(0, 1)
        shares_HWC = shares_HWC * alpha + (1 - alpha)
    return np.asarray(np.rint(shares_HWC * (65535 if deep else 255)), dtype=np.uint16 if deep else np.uint8)


def resized(image_HWC: Pixels, size: int, method: int) -> Pixels:
    """A picture as (size, size, C), by one of OpenCV's interpolations; in the picture's type."""
    import cv2  # takes a moment to import, and reading files does not need it

    bands = image_HWC.shape[2]
    if bands <= _AT_ONCE:
        made = cv2.resize(image_HWC, (size, size), interpolation=method)
        return np.asarray(made, dtype=image_HWC.dtype).reshape(size, size, bands)
    groups = [
        resized(np.ascontiguousarray(image_HWC[:, :, start : start + _AT_ONCE]), size, method)
        for start in range(0, bands, _AT_ONCE)
    ]
    return np.concatenate(groups, axis=2)


def square_of_bands(pixels_HWC: Pixels, size: int) -> Pixels:
    """The centre of a picture, (size, size, C): shorter side resized to `size` (bicubic, antialiased), cropped.

    Each band by itself: Pillow has no pictures of three channels of 16 bits, and takes a fourth for transparency.
    """
    is_deep = pixels_HWC.dtype != np.uint8
    planes = [
        np.asarray(ImageOps.fit(Image.fromarray(plane_HW), (size, size), Image.Resampling.BICUBIC))
        for plane_HW in (pixels_HWC.astype(np.float32) if is_deep else pixels_HWC).transpose(2, 0, 1)
    ]
    made = np.stack(planes, axis=2)
    return np.asarray(np.rint(made).clip(0, 65535) if is_deep else made, dtype=pixels_HWC.dtype)


def as_8_bits(pixels_HWC: Pixels) -> Pixels:
    """Pixels as they are shown, and compared by eye: the nearest of 256 levels."""
    if pixels_HWC.dtype == np.uint8:
        return pixels_HWC
    return np.asarray((pixels_HWC.astype(np.uint32) + 128) // 257, dtype=np.uint8)


def shown_rgb(pixels_HWC: Pixels, pixels: PixelFormat | None) -> Pixels:
    """A picture as people see it: three of its channels, uint8 (H, W, 3).

    Args:
        pixels_HWC: as models see it.
        pixels: which channels are shown; None: the first three.
    """
    chosen = (pixels or PixelFormat()).shown_channels
    if pixels is None or chosen == (0, 1, 2):
        chosen_HWC = pixels_HWC[:, :, :3] if pixels_HWC.shape[2] != 3 else pixels_HWC
    else:
        chosen_HWC = pixels_HWC[:, :, list(chosen)]
    return np.ascontiguousarray(as_8_bits(chosen_HWC))


def moments(pixels_HWC: Pixels) -> NDArray[np.float64]:
    """The mean and the mean square of each channel, (2, C), on a scale where white is 1."""
    white = np.iinfo(pixels_HWC.dtype).max
    values_CP = pixels_HWC.reshape(-1, pixels_HWC.shape[2]).T.astype(np.float64) / white
    return np.stack([values_CP.mean(axis=1), np.square(values_CP).mean(axis=1)])


def mean_and_std(found: Iterable[NDArray[np.float64]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over pictures that count the same, whatever their sizes.

    Args:
        found: of :func:`moments`, of at least one picture.

    Returns:
        Six digits after the point. A channel of one value everywhere has the deviation 1, so that it becomes 0.
    """
    mean_C, square_C = np.mean(np.stack(list(found)), axis=0)
    std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
    std_C = np.where(std_C < 10**-_DIGITS, 1.0, std_C)
    return tuple(np.round(mean_C, _DIGITS).tolist()), tuple(np.round(std_C, _DIGITS).tolist())
