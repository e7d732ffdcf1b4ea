"""The views of a photograph that training compares: distorted random crops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data import colours, deep_colours
from orchestrator.data.augmentation import Augmentation
from orchestrator.data.resampling import num_halvings, resample
from orchestrator.data.views import CropConfig, Range

Pixels = NDArray[np.uint8]

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
        image_HWC: uint8 RGB, or uint16; or C bands, which are not colours.
        config: sizes and distortions.
        rng_for_view: the generator of each view: globals are views 0 to G-1, locals G to G+L-1.
        drawn_in: height and width of the photograph in which boxes are drawn; default: those of `image_HWC`. Views
            of two sizes that are cut from one photograph decoded at two sizes share their boxes by that.
        is_colour: whether the channels are red, green and blue; else their colours are not distorted.

    Returns:
        "globals" (G, C, size, size) and "locals" (L, C, size, size), of the image's type; with `config.gram_size` also
        "gram" (G, C, gram_size, gram_size): the same boxes as the globals, without distortion.
    """
    num_global, num_local = config.num_global, config.num_local
    bands = image_HWC.shape[2]
    views = {
        "globals": np.empty((num_global, bands, config.global_size, config.global_size), image_HWC.dtype),
        "locals": np.empty((num_local, bands, config.local_size, config.local_size), image_HWC.dtype),
    }
    if config.gram_size is not None:
        views["gram"] = np.empty((num_global, bands, config.gram_size, config.gram_size), image_HWC.dtype)
    for view in range(num_global):
        rng = rng_for_view(view)
        box = _box(image_HWC, drawn_in, config.global_scale, config, rng)
        if config.gram_size is not None:
            _put(cut(image_HWC, box, config.gram_size), views["gram"][view])
        blur = config.blur_probability[0 if view == 0 else 1]
        solarize = config.solarize_probability if view == 1 else 0.0
        pixels = _distort(cut(image_HWC, box, config.global_size), config, blur, solarize, rng, is_colour)
        _put(pixels, views["globals"][view])
    for view in range(num_local):
        rng = rng_for_view(num_global + view)
        box = _box(image_HWC, drawn_in, config.local_scale, config, rng)
        pixels = _distort(
            cut(image_HWC, box, config.local_size), config, config.local_blur_probability, 0.0, rng, is_colour
        )
        _put(pixels, views["locals"][view])
    return views


def draw_box(
    height: int, width: int, scale: Range, aspect: Range, rng: np.random.Generator, flip: bool = False
) -> Box:
    """A random box: area uniform in `scale`, aspect ratio log-uniform (Inception-type random resized crop).

    Where ten draws do not fit into the photograph, the largest centred box of a permitted aspect is taken.
    """
    mirrored = flip and bool(rng.random() < 0.5)
    logs = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_BOX_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        ratio = math.exp(logs[0] + (logs[1] - logs[0]) * rng.random())
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
    """A box of the photograph, as (size, size, C); nothing aliases where it shrinks, see `resampling.py`.

    Where the box is halved first, its sides are rounded to whole pixels of the halves, around the same centre: by at
    most half a pixel of the result.
    """
    unit = 2 ** num_halvings(box.height, box.width, size)
    top, height = _in_units(box.top, box.height, image_HWC.shape[0], unit)
    left, width = _in_units(box.left, box.width, image_HWC.shape[1], unit)
    pixels = resample(image_HWC[top : top + height, left : left + width], size)
    return np.asarray(cv2.flip(pixels, 1), pixels.dtype).reshape(pixels.shape) if box.flip else pixels


def _in_units(start: int, length: int, within: int, unit: int) -> tuple[int, int]:
    """The nearest length that `unit` divides, around the same centre, as start and length."""
    rounded = min(round(length / unit), within // unit) * unit
    return min(max(0, start + (length - rounded) // 2), within - rounded), rounded


def _put(pixels_HWC: Pixels, planes_CHW: Pixels) -> None:
    """Write a picture into planes: the same as an assignment of its transpose, several times faster."""
    cv2.split(pixels_HWC, list(planes_CHW))


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
    else:
        pixels_HWC = colours.distort(pixels_HWC, config, blur, solarize, rng)
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
