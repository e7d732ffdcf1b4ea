"""Distortions of views that are not 8-bit RGB: of 16 bits a channel, or of bands that are not colours.

The operations and their draws are those of :mod:`orchestrator.data.crops`, in float32 on a scale from 0 to 1. Where the
channels are not colours, however many there are, what only colours have is left out: saturation, hue and the conversion
to grey; contrast is around the mean of the channels. Brightness and contrast draw one factor for all bands of a view,
so that what bands say relative to each other stays. Blur and solarization are of each band.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.views import CropConfig

Floats = NDArray[np.float32]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def distort(
    pixels_HWC: NDArray[np.uint8],
    config: CropConfig,
    blur: float,
    solarize: float,
    rng: np.random.Generator,
    *,
    is_colour: bool,
) -> NDArray[np.uint8]:
    """A view with the augmentations of `config` before a user's own.

    Args:
        pixels_HWC: (H, W, C) uint8 or uint16.
        config: their strengths and probabilities.
        blur, solarize: the probabilities of this view.
        rng: of this view; as many numbers are drawn as for 8-bit RGB.
        is_colour: whether the channels are red, green and blue, three of them.

    Returns:
        The same shape and type.
    """
    white = np.iinfo(pixels_HWC.dtype).max
    values_HWC = np.ascontiguousarray(pixels_HWC, np.float32) / np.float32(white)
    bands = pixels_HWC.shape[2]
    luma = _LUMA if is_colour else np.full(bands, 1 / bands, np.float32)
    jitter, gray, blurred, solarized = rng.random(4)
    if jitter < config.jitter_probability:
        values_HWC = _jittered(values_HWC, config, rng, luma, is_colour=is_colour)
    if gray < config.gray_probability and is_colour:
        values_HWC = np.repeat((values_HWC @ luma)[:, :, None], 3, axis=2)
    if blurred < blur:
        made = cv2.GaussianBlur(values_HWC, (9, 9), float(rng.uniform(*config.blur_sigma)))
        values_HWC = np.asarray(made, np.float32).reshape(values_HWC.shape)
    if solarized < solarize:
        values_HWC = np.where(values_HWC < 0.5, values_HWC, 1 - values_HWC)
    return np.asarray(np.rint(values_HWC.clip(0, 1) * white), dtype=pixels_HWC.dtype)


def _jittered(
    values_HWC: Floats, config: CropConfig, rng: np.random.Generator, luma: Floats, *, is_colour: bool
) -> Floats:
    """Brightness, contrast, saturation and hue in random order, cut off at black and white after each."""
    factors = {
        "brightness": 1 + config.brightness * rng.uniform(-1, 1),
        "contrast": 1 + config.contrast * rng.uniform(-1, 1),
        "saturation": 1 + config.saturation * rng.uniform(-1, 1),
        "hue": config.hue * rng.uniform(-1, 1),
    }
    names = list(factors)
    for number in rng.permutation(4):
        name, factor = names[number], np.float32(factors[names[number]])
        if name == "brightness":
            values_HWC = values_HWC * factor
        elif name == "contrast":
            level = np.float32(np.mean(values_HWC @ luma))
            values_HWC = values_HWC * factor + (1 - factor) * level
        elif name == "saturation" and is_colour:
            values_HWC = values_HWC * factor + (1 - factor) * (values_HWC @ luma)[:, :, None]
        elif name == "hue" and is_colour and config.hue:
            hsv_HWC = cv2.cvtColor(np.ascontiguousarray(values_HWC.clip(0, 1)), cv2.COLOR_RGB2HSV)
            hsv_HWC[..., 0] = (hsv_HWC[..., 0] + 360 * factor) % 360
            values_HWC = np.asarray(cv2.cvtColor(hsv_HWC, cv2.COLOR_HSV2RGB))
        values_HWC = values_HWC.clip(0, 1)
    return values_HWC
