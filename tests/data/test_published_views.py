"""Views against the published augmentation, written down anew in float64: each operation alone, and all of them.

The reference is what torchvision does to Pillow's images: a box, Pillow's bicubic filter, jitter in random order, grey,
blur with 9 taps, solarization; with draws of its own. What is compared are the distributions of what a view looks like.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from orchestrator.data.crops import make_views
from orchestrator.data.resampling import resample
from orchestrator.data.rng import generator
from orchestrator.data.views import CropConfig

from .test_crops import _PLAIN

_LUMA = np.array([0.299, 0.587, 0.114])


def _photo(height: int, width: int, seed: int) -> np.ndarray:
    """Colours whose spectrum falls with the frequency, as that of photographs does."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(fy, fx), 1 / max(height, width)) ** 1.2
    shared = rng.standard_normal((height, width))
    planes = [
        np.fft.ifft2(np.fft.fft2(shared + 0.6 * rng.standard_normal((height, width))) * fall).real
        for _ in range(3)
    ]
    planes = [110 + 20 * seed + 50 * plane / plane.std() for plane in planes]
    return np.stack(planes, axis=2).clip(0, 255).round().astype(np.uint8)


_PHOTOS = [_photo(100, 134, seed) for seed in range(3)]


def _hsv_turned(image_HWC: np.ndarray, turn: float) -> np.ndarray:
    """By the hexagon's definition (Smith 1978)."""
    high, low = image_HWC.max(axis=2), image_HWC.min(axis=2)
    span = np.where(high > low, high - low, 1)
    r, g, b = np.moveaxis(image_HWC, 2, 0)
    sector = np.where(
        high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)
    )
    sector = (sector + 6 * turn) % 6
    planes = []
    for number in (5, 3, 1):
        k = (number + sector) % 6
        planes.append(high - (high - low) * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(planes, axis=2)


def _published(photo: np.ndarray, config: CropConfig, kind: str, rng: np.random.Generator) -> np.ndarray:
    height, width = photo.shape[:2]
    scale, size = (
        (config.local_scale, config.local_size)
        if kind == "local"
        else (config.global_scale, config.global_size)
    )
    box = None
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            box = (left, top, left + w, top + h)
            break
    assert box is not None
    cropped = Image.fromarray(photo).crop(box).resize((size, size), Image.Resampling.BICUBIC)
    image = np.asarray(cropped).astype(float)
    if rng.random() < config.jitter_probability:
        for number in rng.permutation(4):
            if number == 0:
                image = image * rng.uniform(1 - config.brightness, 1 + config.brightness)
            elif number == 1:
                factor, level = rng.uniform(1 - config.contrast, 1 + config.contrast), (image @ _LUMA).mean()
                image = factor * image + (1 - factor) * level
            elif number == 2:
                factor, gray = (
                    rng.uniform(1 - config.saturation, 1 + config.saturation),
                    (image @ _LUMA)[:, :, None],
                )
                image = factor * image + (1 - factor) * gray
            else:
                image = _hsv_turned(image, rng.uniform(-config.hue, config.hue))
            image = image.clip(0, 255)
    if rng.random() < config.gray_probability:
        image = np.repeat((image @ _LUMA)[:, :, None], 3, axis=2)
    blur = (
        config.local_blur_probability if kind == "local" else config.blur_probability[int(kind == "second")]
    )
    if rng.random() < blur:
        sigma = rng.uniform(*config.blur_sigma)
        image = ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="mirror", radius=(4, 4, 0))
    if kind == "second" and rng.random() < config.solarize_probability:
        image = np.where(image < 128, image, 255 - image)
    return image


def _looks(view_HWC: np.ndarray) -> dict[str, float]:
    """Brightness, contrast, colourfulness, where the colour points, and detail."""
    luma = view_HWC @ _LUMA
    r, g, b = view_HWC.reshape(-1, 3).mean(axis=0)
    rows, columns = np.diff(luma, axis=0), np.diff(luma, axis=1)
    return {
        "mean": float(luma.mean()),
        "deviation": float(luma.std()),
        "colourfulness": float(np.ptp(view_HWC, axis=2).mean()),
        "red - green": float(r - g),
        "yellow - blue": float((r + g) / 2 - b),
        "sharpness": math.log(1e-3 + float((rows**2).mean() + (columns**2).mean())),
    }


def _both(config: CropConfig, num: int) -> dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]]:
    """What our views and the published ones look like, by kind."""
    found: dict[str, tuple[list[Any], list[Any]]] = {kind: ([], []) for kind in ("first", "second", "local")}
    rng = np.random.default_rng(7)
    for number in range(num):
        photo = _PHOTOS[number % len(_PHOTOS)]
        views = make_views(photo, config, lambda view, number=number: generator(number, view))  # type: ignore[misc]
        ours = {"first": views["globals"][0], "second": views["globals"][1], "local": views["locals"][0]}
        for kind, view_CHW in ours.items():
            found[kind][0].append(_looks(view_CHW.transpose(1, 2, 0).astype(float)))
            found[kind][1].append(_looks(_published(photo, config, kind, rng)))
    return found


_OFF = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
_ALONE: dict[str, dict[str, Any]] = {
    "box": _PLAIN,
    **{name: {**_PLAIN, "jitter_probability": 1.0, **_OFF, name: 0.4} for name in _OFF},
    "gray": {**_PLAIN, "gray_probability": 0.5},
    "blur": {**_PLAIN, "blur_probability": (1.0, 0.5), "local_blur_probability": 0.5},
    "solarize": {**_PLAIN, "solarize_probability": 0.5},
    "all": {},
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", list(_ALONE))
def test_views_look_as_the_published_ones_do(name: str) -> None:
    config = CropConfig(global_size=32, local_size=16, num_local=1, **_ALONE[name])
    for kind, (ours, published) in _both(config, 300 if name == "all" else 120).items():
        for what in ours[0]:
            pair = [[look[what] for look in looks] for looks in (ours, published)]
            assert stats.ks_2samp(*pair).pvalue > 1e-4, (kind, what)


def _detail(view_HWC: np.ndarray) -> float:
    pixels = view_HWC.astype(float)
    return float((np.diff(pixels, axis=0) ** 2).mean() + (np.diff(pixels, axis=1) ** 2).mean())


def _against_pillow(shrinks_by: float) -> tuple[float, float]:
    """How much detail a view has, as a multiple of Pillow's, and the difference from it in levels (rms)."""
    details, squares = [], []
    for photo in _PHOTOS:
        size = round(96 / shrinks_by)
        region = photo[2:98, 2:98]
        ours = resample(region, size)
        pillows = np.asarray(Image.fromarray(region).resize((size, size), Image.Resampling.BICUBIC))
        details.append(_detail(ours) / _detail(pillows))
        squares.append(((ours.astype(float) - pillows) ** 2).mean())
    return math.exp(np.log(details).mean()), math.sqrt(np.mean(squares))


@pytest.mark.parametrize(
    "shrinks_by", [0.5, 0.8, 1.1, 1.2, 1.33, 1.45, 1.6, 1.8, 1.9, 2.0, 2.4, 3.0, 3.6, 4.0, 6.0]
)
def test_resampling_keeps_as_much_detail_as_pillow(shrinks_by: float) -> None:
    detail, rms = _against_pillow(shrinks_by)
    assert abs(math.log(detail)) < 0.15
    assert rms < 5


def test_resampling_takes_any_number_of_channels_and_16_bits() -> None:
    """Each channel as if it were alone, and 16 bits as 8 bits are, but finer."""
    image = np.random.default_rng(0).integers(0, 256, (37, 41, 7), dtype=np.uint8)
    for size in (12, 30, 60):
        seven = resample(image, size)
        assert seven.shape == (size, size, 7)
        for channel in range(7):
            assert np.array_equal(seven[:, :, channel : channel + 1], resample(image[:, :, [channel]], size))
        deep = resample(image.astype(np.uint16) * 257, size)
        assert deep.dtype == np.uint16
        assert np.abs(deep / 257 - seven).max() <= 1.6
