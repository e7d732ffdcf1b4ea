"""Colour operations: as often and as strong as in the paper, and equal to Pillow's and SciPy's."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from orchestrator.data.colours import jitter, turn_hue
from orchestrator.data.crops import make_views
from orchestrator.data.rng import generator
from orchestrator.data.views import CropConfig

from .test_crops import _PLAIN, _photo, _rngs

_WHOLE = {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "aspect": (1.0, 1.0)}


def _operations(view_CHW: np.ndarray, plain_HWC: np.ndarray) -> tuple[bool, bool, bool, bool]:
    """Which of jitter, gray, blur and solarize a view of the bright pattern below went through, from its pixels."""
    pixels = view_CHW.transpose(1, 2, 0).astype(float)
    solarized = bool(pixels.max() < 128)
    pixels = 255 - pixels if solarized else pixels
    gray = bool(np.ptp(pixels, axis=2).max() == 0)
    luma = (plain_HWC @ np.array([0.299, 0.587, 0.114])).round()
    expected = luma[..., None] if gray else plain_HWC.astype(float)
    brightness = pixels.mean() / expected.mean()
    blurred = bool(pixels[..., 0].std() < 0.8 * brightness * expected[..., 0].std())
    return abs(brightness - 1) > 1e-3, gray, blurred, solarized


@pytest.mark.heavy
def test_default_colour_operations_come_with_the_papers_probabilities_and_independently() -> None:
    """All 16 combinations, counted by what the pixels show, in each kind of view; recipe.md, "Crops"."""
    noise = generator(0).uniform(-9, 9, (16, 16, 1))
    photo = (np.array([195.0, 185.0, 178.0]) + noise).round().astype(np.uint8)
    config = CropConfig(
        global_size=16, local_size=16, num_local=2, **_WHOLE,
        # So that pixels show which operations they went through: no clipping, no dark jitter, no invisible blur.
        brightness=0.25, contrast=0.0, saturation=0.0, hue=0.0, blur_sigma=(1.0, 2.0),
    )  # fmt: skip
    num_photos = 2000
    counts: dict[str, Counter[tuple[bool, ...]]] = {
        "first": Counter(),
        "second": Counter(),
        "local": Counter(),
    }
    for number in range(num_photos):
        views = make_views(photo, config, _rngs(number))
        counts["first"][_operations(views["globals"][0], photo)] += 1
        counts["second"][_operations(views["globals"][1], photo)] += 1
        for view in views["locals"]:
            counts["local"][_operations(view, photo)] += 1
    # jitter, gray, blur, solarize
    wanted = {"first": (0.8, 0.2, 1.0, 0.0), "second": (0.8, 0.2, 0.1, 0.2), "local": (0.8, 0.2, 0.5, 0.0)}
    for kind, probabilities in wanted.items():
        total = counts[kind].total()
        assert total == num_photos * (2 if kind == "local" else 1)
        for combination in itertools.product((False, True), repeat=4):
            p = math.prod(q if on else 1 - q for q, on in zip(probabilities, combination, strict=True))
            # One jitter in 250 is too weak to be seen.
            slack = 4.5 * math.sqrt(p * (1 - p) / total) + 0.004 * p
            assert abs(counts[kind][combination] / total - p) <= slack, (kind, combination)


@pytest.mark.heavy
def test_default_jitter_factors_are_uniform_in_the_published_ranges() -> None:
    """Each factor alone, from what it does to the pixels; hue as the turn that colorsys sees in them."""
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    defaults = CropConfig()
    assert {name: getattr(defaults, name) for name in strengths} == strengths
    # Far from what each operation leaves where it is, and so that nothing is cut off.
    photos = {
        "brightness": [[170, 160, 150], [150, 160, 170]],
        "contrast": [[40, 40, 40], [200, 200, 200]],
        "saturation": [[200, 60, 60], [60, 200, 200]],
        "hue": [[230, 60, 40], [30, 200, 90], [60, 40, 220]],
    }
    for name, strength in strengths.items():
        config = CropConfig(**{other: 0.0 for other in strengths if other != name})
        photo = np.array([photos[name]], np.uint8)
        flat = photo[0].astype(float)
        gray = (flat @ np.array([0.299, 0.587, 0.114]))[:, None]
        fixed = {"brightness": 0.0, "contrast": gray.mean(), "saturation": gray}.get(name)
        factors = []
        for seed in range(2000):
            pixels = jitter(photo, config, generator(seed))
            if name == "hue":
                turns = [turn_between(*pair) for pair in zip(photo[0], pixels[0], strict=True)]
                assert np.ptp(turns) < 1 / 128
                factors.append(np.mean(turns))
                continue
            factor = (pixels[0] - fixed) / (flat - fixed)
            assert np.ptp(factor) < 0.03, name
            factors.append(factor.mean())
        centre = 0 if name == "hue" else 1
        low, width = centre - strength, 2 * strength
        assert min(factors) >= low - 1 / 256
        assert max(factors) <= low + width + 1 / 256
        assert stats.kstest(factors, "uniform", (low, width)).pvalue > 1e-4, name


def turn_between(before: np.ndarray, after: np.ndarray) -> float:
    """Of the hue, as a share of the circle, in [-1/2, 1/2)."""
    hues = [colorsys.rgb_to_hsv(*(colour.astype(float) / 255))[0] for colour in (before, after)]
    return (hues[1] - hues[0] + 0.5) % 1 - 0.5


def test_hue_turns_in_hsv_and_leaves_saturation_and_value() -> None:
    """Every colour of a cube, against Python's own HSV; in YIQ, greens would turn up to 1.35 times as far."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    for turn in (0.1, -0.1, 0.037):
        got = turn_hue(cube, turn)[0].astype(float)
        expected = [
            colorsys.hsv_to_rgb((h + int(256 * turn) / 256) % 1, s, v)
            for h, s, v in (colorsys.rgb_to_hsv(*colour) for colour in cube[0] / 255.0)
        ]
        # Hue has 256 values here and in Pillow, whose own colours are up to 12 levels off.
        assert np.abs(got - 255 * np.array(expected)).max() <= 9
        assert np.abs(got - 255 * np.array(expected)).mean() <= 1


def test_jitter_equals_one_operation_after_the_other() -> None:
    """All orders, against the definitions in float64, rounded and cut off after each operation as Pillow's are."""
    y, x = np.mgrid[0:24, 0:24]
    # From black to white, so that much is cut off between operations.
    photo = np.stack([255 * x / 23, 255 * y / 23, 255 * (x + y) / 46], axis=2).astype(np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    config = CropConfig()
    orders = set()
    for seed in range(60):
        rng = generator(seed)
        draws = rng.uniform(-1, 1, 4)
        order = rng.permutation(4)
        orders.add(tuple(order))
        pixels = photo.astype(float)
        for number in order:
            if number == 0:
                pixels = pixels * (1 + 0.4 * draws[0])
            elif number == 1:
                level = (pixels @ luma).mean()
                pixels = level + (1 + 0.4 * draws[1]) * (pixels - level)
            elif number == 2:
                gray = (pixels @ luma)[..., None]
                pixels = gray + (1 + 0.2 * draws[2]) * (pixels - gray)
            else:
                pixels = turn_hue(pixels.astype(np.uint8), 0.1 * draws[3]).astype(float)
            pixels = pixels.round().clip(0, 255)
        difference = np.abs(jitter(photo, config, generator(seed)).astype(float) - pixels)
        # Where rounding differs by a level before hue is turned, a colour near grey may turn by more.
        assert difference.mean() < 0.5, (seed, order)
        assert np.quantile(difference, 0.99) <= 3, (seed, order)
    assert len(orders) > 20


# --- each operation against another library --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_equals_pillows_enhancements(name: str) -> None:
    enhancer = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }[name]
    strengths = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {name: 0.4}
    photo = _photo(48, 48)
    config = CropConfig(
        global_size=48, local_size=8, num_local=0, **_WHOLE,
        **{**_PLAIN, "jitter_probability": 1.0}, **strengths,
    )  # fmt: skip
    seen = set()
    for seed in range(20):
        view = make_views(photo, config, _rngs(seed))["globals"][0].transpose(1, 2, 0).astype(int)
        # The factor that fits best; Pillow rounds after every operation, hence two levels of slack.
        factors = np.linspace(0.6, 1.4, 161)
        pictures = [np.asarray(enhancer(Image.fromarray(photo)).enhance(f), int) for f in factors]
        errors = [np.abs(picture - view).max() for picture in pictures]
        assert min(errors) <= 2
        seen.add(round(float(factors[int(np.argmin(errors))]), 2))
    assert len(seen) > 10


def test_gray_and_solarize_equal_pillows() -> None:
    photo = generator(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    base = {"global_size": 32, "local_size": 8, "num_local": 0, **_WHOLE}
    gray = make_views(photo, CropConfig(**base, **{**_PLAIN, "gray_probability": 1.0}), _rngs(0))["globals"]
    expected = np.asarray(ImageOps.grayscale(Image.fromarray(photo)), int)
    assert np.abs(gray.astype(int) - expected).max() <= 1
    solar = make_views(photo, CropConfig(**base, **{**_PLAIN, "solarize_probability": 1.0}), _rngs(0))
    inverted = np.asarray(ImageOps.solarize(Image.fromarray(photo), threshold=128))
    assert np.array_equal(solar["globals"][1].transpose(1, 2, 0), inverted)
    assert np.array_equal(solar["globals"][0].transpose(1, 2, 0), photo)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_scipys_gaussian(sigma: float) -> None:
    photo = generator(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    config = CropConfig(
        global_size=32, local_size=8, num_local=0, blur_sigma=(sigma, sigma), **_WHOLE,
        **{**_PLAIN, "blur_probability": (1.0, 0.0)},
    )  # fmt: skip
    view = make_views(photo, config, _rngs(0))["globals"][0].transpose(1, 2, 0)
    expected = ndimage.gaussian_filter(
        photo.astype(float), (sigma, sigma, 0), mode="mirror", radius=(4, 4, 0)
    )
    assert np.abs(view - expected).max() <= 1.5
