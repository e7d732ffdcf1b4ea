"""The views of a photograph that training compares: distorted random crops, in uint8 on OpenCV.

Brightness, contrast, saturation and grayscale are all affine in RGB once contrast's mean is known, and a mean passes
through affine maps. So those that come before hue are folded into one 3×4 matrix, and those after it into another:
each takes a single pass over the pixels, and values are clipped after it instead of after every operation. Hue is
turned in HSV, in 8 bits a channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data import deep_colours
from orchestrator.data.augmentation import Augmentation
from orchestrator.data.views import CropConfig, Range

Pixels = NDArray[np.uint8]
Affine = tuple[NDArray[np.float64], NDArray[np.float64]]

_LUMA = np.array([0.299, 0.587, 0.114])
_GRAY = np.tile(_LUMA, (3, 1))
_SOLARIZE = np.where(np.arange(256) < 128, np.arange(256), 255 - np.arange(256)).astype(np.uint8)
_SAME: Affine = (np.eye(3), np.zeros(3))
_BOX_ATTEMPTS = 10


@dataclass(frozen=True)
class Box:
    """A crop in pixels of the photograph, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def make_views(
    image_HWC: Pixels,
    config: CropConfig,
    rng_for_view: Callable[[int], np.random.Generator],
    drawn_in: tuple[int, int] | None = None,
    is_colour: bool = True,
) -> dict[str, Pixels]:
    """All views of one photograph.

    Args:
        image_HWC: uint8 RGB, or uint16.
        config: sizes and distortions.
        rng_for_view: the generator of each view: globals are views 0 to G-1, locals G to G+L-1.
        drawn_in: height and width of the photograph in which boxes are drawn; default: those of `image_HWC`. Views
            of two sizes that are cut from one photograph decoded at two sizes share their boxes by that.
        is_colour: whether the channels are red, green and blue; else their colours are not distorted.

    Returns:
        "globals" (G, 3, size, size) and "locals" (L, 3, size, size), of the image's type; with `config.gram_size` also
        "gram" (G, 3, gram_size, gram_size): the same boxes as the globals, without distortion.
    """
    num_global, num_local = config.num_global, config.num_local
    views = {
        "globals": np.empty((num_global, 3, config.global_size, config.global_size), image_HWC.dtype),
        "locals": np.empty((num_local, 3, config.local_size, config.local_size), image_HWC.dtype),
    }
    if config.gram_size is not None:
        views["gram"] = np.empty((num_global, 3, config.gram_size, config.gram_size), image_HWC.dtype)
    for view in range(num_global):
        rng = rng_for_view(view)
        box = _box(image_HWC, drawn_in, config.global_scale, config, rng)
        if config.gram_size is not None:
            views["gram"][view] = cut(image_HWC, box, config.gram_size).transpose(2, 0, 1)
        blur = config.blur_probability[0 if view == 0 else 1]
        solarize = config.solarize_probability if view == 1 else 0.0
        pixels = _distort(cut(image_HWC, box, config.global_size), config, blur, solarize, rng, is_colour)
        views["globals"][view] = pixels.transpose(2, 0, 1)
    for view in range(num_local):
        rng = rng_for_view(num_global + view)
        box = _box(image_HWC, drawn_in, config.local_scale, config, rng)
        pixels = _distort(
            cut(image_HWC, box, config.local_size), config, config.local_blur_probability, 0.0, rng, is_colour
        )
        views["locals"][view] = pixels.transpose(2, 0, 1)
    return views


def draw_box(
    height: int, width: int, scale: Range, aspect: Range, rng: np.random.Generator, flip: bool = False
) -> Box:
    """A random box: area uniform in `scale`, aspect ratio log-uniform (Inception-type random resized crop).

    Where ten draws do not fit into the photograph, the largest centred box of a permitted aspect is taken.
    """
    mirrored = flip and bool(rng.random() < 0.5)
    for _ in range(_BOX_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w, mirrored)
    w = max(1, min(width, math.floor(height * aspect[1])))
    h = max(1, min(height, math.floor(width / aspect[0])))
    return Box((height - h) // 2, (width - w) // 2, h, w, mirrored)


def _box(
    image_HWC: Pixels,
    drawn_in: tuple[int, int] | None,
    scale: Range,
    config: CropConfig,
    rng: np.random.Generator,
) -> Box:
    """A box drawn in a photograph of one size, in pixels of the photograph at hand."""
    height, width = image_HWC.shape[:2]
    rows, columns = drawn_in or (height, width)
    box = draw_box(rows, columns, scale, config.aspect, rng, config.flip)
    if (rows, columns) == (height, width):
        return box
    top, left = (box.top * height) // rows, (box.left * width) // columns
    tall = max(1, round(box.height * height / rows))
    wide = max(1, round(box.width * width / columns))
    return Box(top, left, min(tall, height - top), min(wide, width - left), box.flip)


def cut(image_HWC: Pixels, box: Box, size: int) -> Pixels:
    """A box of the photograph, as (size, size, 3); averages when shrinking, so that nothing aliases."""
    region = image_HWC[box.top : box.top + box.height, box.left : box.left + box.width]
    method = cv2.INTER_AREA if min(box.height, box.width) >= size else cv2.INTER_CUBIC
    pixels = cv2.resize(region, (size, size), interpolation=method)
    return np.asarray(pixels[:, ::-1] if box.flip else pixels, dtype=image_HWC.dtype)


def _distort(
    pixels_HWC: Pixels,
    config: CropConfig,
    blur: float,
    solarize: float,
    rng: np.random.Generator,
    is_colour: bool = True,
) -> Pixels:
    if not is_colour or pixels_HWC.dtype != np.uint8:
        pixels_HWC = deep_colours.distort(pixels_HWC, config, blur, solarize, rng, is_colour=is_colour)
        for own in config.augmentations:
            pixels_HWC = _augmented(own, pixels_HWC, rng)
        return pixels_HWC
    jitter, gray, blurred, solarized = rng.random(4)
    colours = _SAME
    if jitter < config.jitter_probability:
        pixels_HWC, colours = _jitter(pixels_HWC, config, rng)
    if gray < config.gray_probability:
        colours = _then(colours, _GRAY)
    pixels_HWC = _mapped(pixels_HWC, colours)
    if blurred < blur:
        sigma = float(rng.uniform(*config.blur_sigma))
        pixels_HWC = np.asarray(cv2.GaussianBlur(pixels_HWC, (9, 9), sigma), dtype=np.uint8)
    if solarized < solarize:
        pixels_HWC = np.asarray(cv2.LUT(pixels_HWC, _SOLARIZE), dtype=np.uint8)
    for own in config.augmentations:
        pixels_HWC = _augmented(own, pixels_HWC, rng)
    return pixels_HWC


def _augmented(own: Augmentation, pixels_HWC: Pixels, rng: np.random.Generator) -> Pixels:
    """What an augmentation of a user's package makes of a view.

    Raises:
        TypeError: it is not a view.
    """
    shape, kind = pixels_HWC.shape, pixels_HWC.dtype
    # A flipped view is not contiguous, which not all libraries take.
    made = own.apply(np.ascontiguousarray(pixels_HWC), rng)
    if not isinstance(made, np.ndarray) or made.dtype != kind or made.shape != shape:
        given = f"{made.dtype} {made.shape}" if isinstance(made, np.ndarray) else type(made).__name__
        raise TypeError(f"{own.use}.apply gave {given}, not {kind} {shape}")
    return made


def _jitter(pixels_HWC: Pixels, config: CropConfig, rng: np.random.Generator) -> tuple[Pixels, Affine]:
    """Brightness, contrast, saturation and hue in random order.

    Returns:
        The pixels after hue and all that comes before it, and what comes after it as one affine map.
    """
    factors = {
        "brightness": 1 + config.brightness * rng.uniform(-1, 1),
        "contrast": 1 + config.contrast * rng.uniform(-1, 1),
        "saturation": 1 + config.saturation * rng.uniform(-1, 1),
        "hue": config.hue * rng.uniform(-1, 1),
    }
    names = list(factors)
    colours = _SAME
    for number in rng.permutation(4):
        name = names[number]
        factor = factors[name]
        if name == "brightness":
            colours = _then(colours, factor * np.eye(3))
        elif name == "saturation":
            colours = _then(colours, factor * np.eye(3) + (1 - factor) * _GRAY)
        elif name == "contrast":
            level = float(_LUMA @ (colours[0] @ np.array(cv2.mean(pixels_HWC)[:3]) + colours[1]))
            colours = _then(colours, factor * np.eye(3), (1 - factor) * level)
        elif config.hue:
            pixels_HWC, colours = _turned(_mapped(pixels_HWC, colours), factor), _SAME
    return pixels_HWC, colours


def _then(first: Affine, matrix: NDArray[np.float64], offset: float = 0.0) -> Affine:
    """An affine map of RGB in [0, 255], and another after it."""
    return matrix @ first[0], matrix @ first[1] + offset


def _mapped(pixels_HWC: Pixels, colours: Affine) -> Pixels:
    if colours is _SAME:
        return pixels_HWC
    fused = np.concatenate([colours[0], colours[1][:, None]], axis=1).astype(np.float32)
    return np.asarray(cv2.transform(pixels_HWC, fused), dtype=np.uint8)


def _turned(pixels_HWC: Pixels, turn: float) -> Pixels:
    """Hue turned by a share of the circle, rounded towards 0 to one of 256; saturation and value stay.

    With 8 bits a channel colours come out within 9 levels of 255, 0.6 on average: as near as Pillow's.
    """
    steps = int(256 * turn)
    if steps == 0:
        return pixels_HWC
    hsv_HWC = cv2.cvtColor(pixels_HWC, cv2.COLOR_RGB2HSV_FULL)
    hsv_HWC[..., 0] += np.uint8(steps % 256)  # wraps around
    return np.asarray(cv2.cvtColor(hsv_HWC, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)
