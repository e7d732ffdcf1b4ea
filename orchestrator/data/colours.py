"""Distortions of views in 8-bit RGB: jitter of colours, grey, blur and solarization, on OpenCV.

Each operation rounds to 8 bits and cuts off at black and white before the next one, as the published augmentation's do.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.views import CropConfig

Pixels = NDArray[np.uint8]

_LUMA = (0.299, 0.587, 0.114)
_SOLARIZE = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)
_JITTER = ("brightness", "contrast", "saturation", "hue")
# The published kernel of 9 taps, whatever the deviation.
_TAPS = np.arange(-4, 5)
# What OpenCV keeps of a tap's weight for pixels of 8 bits.
_WEIGHT = 256


def distort(
    pixels_HWC: Pixels, config: CropConfig, blur: float, solarize: float, rng: np.random.Generator
) -> Pixels:
    """A view with the augmentations of `config` before a user's own.

    Args:
        pixels_HWC: (H, W, 3) uint8, RGB; stays as it is.
        config: their strengths and probabilities.
        blur, solarize: the probabilities of this view.
        rng: of this view.

    Returns:
        The same shape and type.
    """
    jittered, gray, blurred, solarized = rng.random(4).tolist()
    if jittered < config.jitter_probability:
        pixels_HWC = jitter(pixels_HWC, config, rng)
    if gray < config.gray_probability:
        plane_HW = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2GRAY)
        pixels_HWC = np.asarray(cv2.cvtColor(plane_HW, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    if blurred < blur:
        low, high = config.blur_sigma
        pixels_HWC = blur_gaussian(pixels_HWC, low + (high - low) * float(rng.random()))
    if solarized < solarize:
        pixels_HWC = np.asarray(cv2.LUT(pixels_HWC, _SOLARIZE), dtype=np.uint8)
    return pixels_HWC


def jitter(pixels_HWC: Pixels, config: CropConfig, rng: np.random.Generator) -> Pixels:
    """Brightness, contrast, saturation and hue in random order, each by a factor that is uniform in its range."""
    draws = (2 * rng.random(4) - 1).tolist()
    for number in rng.permutation(4).tolist():
        name = _JITTER[number]
        change = getattr(config, name) * draws[number]
        if name == "hue":
            pixels_HWC = turn_hue(pixels_HWC, change)
        elif name == "brightness":
            pixels_HWC = _blended(pixels_HWC, 1 + change)
        elif name == "contrast":
            level = sum(luma * mean for luma, mean in zip(_LUMA, cv2.mean(pixels_HWC), strict=False))
            pixels_HWC = _blended(pixels_HWC, 1 + change, level=-change * level)
        else:
            pixels_HWC = _blended(pixels_HWC, 1 + change, gray=-change)
    return pixels_HWC


def _blended(pixels_HWC: Pixels, own: float, gray: float = 0.0, level: float = 0.0) -> Pixels:
    """`own` × the pixels + `gray` × their luma + `level`, rounded and cut off at 0 and 255."""
    r, g, b = (gray * luma for luma in _LUMA)
    matrix = np.array([[own + r, g, b, level], [r, own + g, b, level], [r, g, own + b, level]], np.float32)
    return np.asarray(cv2.transform(pixels_HWC, matrix), dtype=np.uint8)


def turn_hue(pixels_HWC: Pixels, turn: float) -> Pixels:
    """Hue turned by a share of the circle, rounded towards 0 to one of 256; saturation and value stay.

    With 8 bits a channel colours come out within 9 levels of 255, 0.6 on average: as near as Pillow's.
    """
    steps = int(256 * turn)
    if steps == 0:
        return pixels_HWC
    hsv_HWC = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv_HWC.reshape(len(hsv_HWC), -1)
    # A whole row at a time is several times faster than every third value.
    turned = np.zeros(rows.shape[1], np.uint8)
    turned[::3] = steps % 256
    np.add(rows, turned, out=rows)  # wraps around
    return np.asarray(cv2.cvtColor(hsv_HWC, cv2.COLOR_HSV2RGB_FULL, dst=hsv_HWC), dtype=np.uint8)


def blur_gaussian(pixels_HWC: Pixels, sigma: float) -> Pixels:
    """Blurred with a Gaussian of 9 taps, mirrored at the edges.

    Weights are rounded to 1/256 and sum to 1, as in OpenCV's own for 8 bits; taps that have none are left out.
    """
    weights = np.exp(_TAPS**2 / (-2 * sigma**2))
    weights = np.rint(weights * (_WEIGHT / weights.sum()))
    weights[len(_TAPS) // 2] += _WEIGHT - weights.sum()
    kernel = weights[weights > 0] / _WEIGHT
    if len(kernel) == 1:
        return pixels_HWC
    return np.asarray(cv2.sepFilter2D(pixels_HWC, -1, kernel, kernel), dtype=np.uint8)
