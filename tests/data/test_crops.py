"""Views: the right sizes and boxes, colours as the slow formulas give them, randomness by view."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from orchestrator.data.crops import cut, draw_box, make_views
from orchestrator.data.rng import generator
from orchestrator.data.views import CropConfig

_PLAIN = {
    "jitter_probability": 0.0,
    "gray_probability": 0.0,
    "blur_probability": (0.0, 0.0),
    "local_blur_probability": 0.0,
    "solarize_probability": 0.0,
}


def _photo(height: int = 120, width: int = 200) -> np.ndarray:
    """Smooth colours in the middle of the range, so that nothing clips."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [100 + 30 * np.sin(y / 17), 120 + 30 * np.cos(x / 23), 130 + 25 * np.sin((x + y) / 31)]
    return np.stack(planes, axis=2).astype(np.uint8)


def _rngs(seed: int) -> Any:
    return lambda view: generator(seed, view)


def test_shapes_and_types() -> None:
    config = CropConfig(global_size=32, local_size=16, num_local=3, gram_size=64)
    views = make_views(_photo(), config, _rngs(0))
    shapes = {name: (array.shape, array.dtype) for name, array in views.items()}
    assert shapes == {
        "globals": ((2, 3, 32, 32), np.uint8),
        "locals": ((3, 3, 16, 16), np.uint8),
        "gram": ((2, 3, 64, 64), np.uint8),
    }
    assert "gram" not in make_views(_photo(), CropConfig(global_size=32, local_size=16), _rngs(0))


def test_a_view_depends_on_its_own_generator_only() -> None:
    config = CropConfig(global_size=32, local_size=16)
    base = make_views(_photo(), config, _rngs(0))
    changed = make_views(_photo(), config, lambda view: generator(1 if view == 3 else 0, view))
    assert np.array_equal(base["globals"], changed["globals"])
    same = [np.array_equal(a, b) for a, b in zip(base["locals"], changed["locals"], strict=True)]
    assert same == [True, False, *[True] * 6]


def test_gram_views_are_the_globals_boxes_undistorted() -> None:
    distorted = CropConfig(global_size=32, local_size=16, gram_size=32)
    plain = CropConfig(global_size=32, local_size=16, gram_size=32, **_PLAIN)
    views = make_views(_photo(), plain, _rngs(4))
    assert np.array_equal(views["gram"], views["globals"])
    again = make_views(_photo(), distorted, _rngs(4))
    assert np.array_equal(again["gram"], views["gram"])
    assert not np.array_equal(again["globals"], views["globals"])


def test_boxes_follow_scale_and_aspect() -> None:
    rng = generator(0)
    boxes = [draw_box(400, 500, (0.05, 0.32), (3 / 4, 4 / 3), rng) for _ in range(2000)]
    areas = np.array([box.height * box.width for box in boxes]) / 200_000
    ratios = np.log([box.width / box.height for box in boxes])
    assert areas.min() > 0.048
    assert areas.max() < 0.325
    assert abs(areas.mean() - 0.185) < 0.01
    assert np.abs(ratios).max() < math.log(4 / 3) + 0.03
    assert abs(ratios.mean()) < 0.02
    assert all(0 <= box.top <= 400 - box.height and 0 <= box.left <= 500 - box.width for box in boxes)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["globals", "locals"])
def test_default_views_have_the_papers_scales_and_aspects(kind: str) -> None:
    """Boxes measured in the finished views of a photo whose colours are its coordinates, against plain sampling."""
    y, x = np.mgrid[0:256, 0:256]
    photo = np.stack([x, y, 0 * x], axis=2).astype(np.uint8)
    config = CropConfig(global_size=32, local_size=32, num_local=2, **_PLAIN)
    sides = []
    for number in range(1000):
        for view in make_views(photo, config, _rngs(number))[kind].astype(float):
            # From the centre of the first cell to that of the last one.
            width = (view[0, :, -1] - view[0, :, 0]).mean() * 32 / 31
            height = (view[1, -1] - view[1, 0]).mean() * 32 / 31
            sides.append((width, height))
    widths, heights = np.array(sides).T
    areas, ratios = widths * heights / 256**2, np.log(widths / heights)
    low, high = (0.32, 1.0) if kind == "globals" else (0.05, 0.32)
    rng = np.random.default_rng(0)
    drawn_areas, drawn_ratios = rng.uniform(low, high, 20_000), rng.uniform(*np.log([3 / 4, 4 / 3]), 20_000)
    fits = (drawn_areas * np.exp(drawn_ratios) <= 1) & (drawn_areas * np.exp(-drawn_ratios) <= 1)
    assert low - 0.01 < areas.min() < low + 0.02
    assert high - 0.03 < areas.max() < high + 0.015
    assert 0.26 < np.abs(ratios).max() < math.log(4 / 3) + 0.03
    assert stats.ks_2samp(areas, drawn_areas[fits]).pvalue > 1e-4
    assert stats.ks_2samp(ratios, drawn_ratios[fits]).pvalue > 1e-4


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1), (1, 300)])
def test_extreme_photos_still_give_a_box(height: int, width: int) -> None:
    box = draw_box(height, width, (0.9, 1.0), (3 / 4, 4 / 3), generator(0))
    assert 1 <= box.height <= height
    assert 1 <= box.width <= width
    assert cut(np.zeros((height, width, 3), np.uint8), box, 8).shape == (8, 8, 3)


def test_flips_mirror_half_of_the_views() -> None:
    rng = generator(1)
    flips = [draw_box(50, 50, (0.5, 1.0), (1.0, 1.0), rng, flip=True).flip for _ in range(400)]
    assert 0.4 < np.mean(flips) < 0.6
    assert not any(draw_box(50, 50, (0.5, 1.0), (1.0, 1.0), rng).flip for _ in range(50))


def test_shrinking_averages_and_does_not_alias() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::2] = 255
    box = draw_box(128, 128, (1.0, 1.0), (1.0, 1.0), generator(0))
    assert np.abs(cut(stripes, box, 16).astype(int) - 127).max() <= 2


def test_gray_views_are_gray_and_only_the_second_global_is_solarized() -> None:
    photo = np.full((64, 64, 3), 0, np.uint8) + np.array([200, 180, 220], np.uint8)
    gray = make_views(
        photo, CropConfig(global_size=16, local_size=8, **{**_PLAIN, "gray_probability": 1.0}), _rngs(0)
    )
    expected = round(0.299 * 200 + 0.587 * 180 + 0.114 * 220)
    assert np.abs(gray["globals"].astype(int) - expected).max() <= 1
    solar = make_views(
        photo, CropConfig(global_size=16, local_size=8, **{**_PLAIN, "solarize_probability": 1.0}), _rngs(0)
    )
    assert solar["globals"][0, :, 0, 0].tolist() == [200, 180, 220]
    assert solar["globals"][1, :, 0, 0].tolist() == [55, 75, 35]
    assert solar["locals"][0, :, 0, 0].tolist() == [200, 180, 220]


def test_blur_probabilities_are_by_view() -> None:
    noise = generator(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    config = {"global_size": 32, "local_size": 32, "blur_sigma": (2.0, 2.0)}
    plain = make_views(noise, CropConfig(**config, **_PLAIN), _rngs(0))
    first = make_views(noise, CropConfig(**config, **{**_PLAIN, "blur_probability": (1.0, 0.0)}), _rngs(0))
    assert first["globals"][0].std() < 0.5 * plain["globals"][0].std()
    assert np.array_equal(first["globals"][1], plain["globals"][1])
    other = make_views(noise, CropConfig(**config, **{**_PLAIN, "blur_probability": (0.0, 1.0)}), _rngs(0))
    assert np.array_equal(other["globals"][0], plain["globals"][0])
    assert other["globals"][1].std() < 0.5 * plain["globals"][1].std()


def test_photos_decoded_to_min_side_need_no_enlarging() -> None:
    config = CropConfig(global_size=64, local_size=32, gram_size=128)
    side = config.min_side
    assert side >= 128 / math.sqrt(0.32)
    assert side >= 32 / math.sqrt(0.05)
    assert CropConfig(global_size=64, local_size=32, num_local=0).min_side == math.ceil(64 / math.sqrt(0.32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_scale": (0.9, 0.3)},
        {"global_scale": (0.3, 1.2)},
        {"global_size": 0},
        {"jitter_probability": 1.5},
        {"blur_sigma": (0.0, 1.0)},
        {"num_locals": 8},
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong)) + "|first"):
        CropConfig(**wrong)  # type: ignore[arg-type]
