"""Near duplicates, and the descriptor that clusters are made of."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.datasets import load_sample_image

from orchestrator.data.curation.dedup import drop_near_duplicates, near_duplicates, usual_distance
from orchestrator.data.curation.descriptor import DIM, describe, thumbnail


def _picture(seed: int, side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] * (1.0 / side)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return (127 + 90 * np.stack(waves, 2)).astype(np.uint8)


def _thumbnails(images: list[np.ndarray]) -> np.ndarray:
    return np.array([thumbnail(image, 32).reshape(-1) for image in images])


def _recompressed(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def test_recompressed_and_resized_copies_are_found() -> None:
    originals = [_picture(seed) for seed in range(40)]
    larger = np.asarray(Image.fromarray(originals[7]).resize((128, 128), Image.Resampling.BICUBIC))
    copies = [_recompressed(originals[3], 75), larger, _recompressed(originals[3], 90)]
    found = near_duplicates(_thumbnails(originals + copies), np.ones(43), 3.0)
    assert found == {40: 3, 41: 7, 42: 3}


def test_other_aspect_ratios_and_tolerances() -> None:
    pair = _thumbnails([_picture(0), _recompressed(_picture(0), 75)])
    assert near_duplicates(pair, np.array([1.0, 1.0]), 3.0) == {1: 0}
    assert near_duplicates(pair, np.array([1.0, 1.5]), 3.0) == {}
    assert near_duplicates(pair, np.ones(2), 0.0) == {}
    assert near_duplicates(pair[[0, 0]], np.ones(2), 0.0) == {1: 0}


def _fixed_camera(photo: str, count: int = 40) -> list[np.ndarray]:
    """A real photograph as often as a camera that stands still takes it: noise, light that flickers by 1 %, and every
    second time a scratch three pixels wide."""
    base = load_sample_image(photo).astype(float)
    pictures = []
    for number in range(count):
        rng = np.random.default_rng(number)
        taken = base * (1 + 0.01 * rng.standard_normal()) + 4 * rng.standard_normal(base.shape)
        picture = np.ascontiguousarray(taken.clip(0, 255).astype(np.uint8))
        if number % 2:
            at = rng.integers(100, 400, 2)
            to = at + rng.integers(-60, 60, 2)
            cv2.line(picture, tuple(map(int, at)), tuple(map(int, to)), (20, 20, 20), 3)
        pictures.append(picture)
    return pictures


def _crops(photo: str, count: int = 60) -> list[np.ndarray]:
    """Views of a real photograph, each of another part of it."""
    whole, rng = load_sample_image(photo), np.random.default_rng(0)
    at = [(rng.integers(0, 227), rng.integers(0, 340)) for _ in range(count)]
    return [whole[y : y + 200, x : x + 300] for y, x in at]


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_a_camera_that_stands_still_keeps_its_pictures_and_others_lose_their_copies(photo: str) -> None:
    still, crops = _fixed_camera(photo), _crops(photo)
    copies = [_recompressed(crop, 60) for crop in crops[:20]]
    names = [("still", f"{number}.png") for number in range(len(still))]
    names += [("web", f"{number}.jpg") for number in range(len(crops) + len(copies))]
    rows, aspects = _thumbnails([*still, *crops, *copies]), np.array([1.5] * len(names))
    kept_as, told = drop_near_duplicates(rows, aspects, names, 3.0, 0.15)
    assert kept_as == {100 + number: 40 + number for number in range(20)}
    of_still, of_web = told
    assert (of_still.spared > 30, of_still.dropped, of_web.spared) == (True, (), 0)
    assert of_web.dropped[0] == ("60.jpg", "web/0.jpg")
    said = of_still.warning() or ""
    assert f"still: {of_still.spared} of 40 pictures look nearly like another one, and are kept" in said
    assert "still/0.png" in said
    assert "20 of 80 pictures are dropped" in (of_web.warning() or "")
    # What used to be: forty pictures are four.
    alone, absolute = drop_near_duplicates(rows[:40], aspects[:40], names[:40], 3.0, None)
    assert len(alone) > 30
    assert "set a smaller `near_duplicate`" in (absolute[0].warning() or "")
    assert absolute[0].record()["dropped"] == len(alone)


def test_the_usual_distance_is_the_third_quartile_of_the_nearest() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 255, (200, 48)).astype(np.float32)
    rows[2100 % 200] = rows[7]
    distances = cdist(rows.astype(np.float64), rows.astype(np.float64)) / np.sqrt(48)
    np.fill_diagonal(distances, np.inf)
    expected = np.quantile(distances.min(axis=1), 0.75)
    assert usual_distance(rows, np.random.default_rng(1)) == pytest.approx(expected, rel=1e-9)
    assert usual_distance(rows[:3], np.random.default_rng(1)) is None
    many = rng.uniform(0, 255, (2500, 12)).astype(np.float32)
    of_all = cdist(many.astype(np.float64), many.astype(np.float64)) / np.sqrt(12)
    np.fill_diagonal(of_all, np.inf)
    asked = np.sort(np.random.default_rng(2).permutation(2500)[:256])
    assert usual_distance(many, np.random.default_rng(2)) == pytest.approx(
        np.quantile(of_all.min(axis=1)[asked], 0.75), rel=1e-6
    )


def test_a_pair_has_the_smaller_limit_of_its_two() -> None:
    pair = _thumbnails([_picture(0), _recompressed(_picture(0), 75)])
    assert near_duplicates(pair, np.ones(2), np.array([3.0, 3.0])) == {1: 0}
    assert near_duplicates(pair, np.ones(2), np.array([0.0, 3.0])) == {}
    assert near_duplicates(pair, np.ones(2), np.array([3.0, 0.0])) == {}


def test_a_slow_drift_does_not_merge_its_ends() -> None:
    levels = np.arange(0, 60, 1.5, dtype=np.float32)
    drift = np.repeat(levels[:, None], 3072, axis=1)
    found = near_duplicates(drift, np.ones(len(levels)), 2.0)
    kept = [row for row in range(len(levels)) if row not in found]
    assert kept == list(range(0, 40, 2))
    assert all(row - original == 1 for row, original in found.items())


def test_more_rows_than_one_chunk() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(0, 255, (1500, 48)).astype(np.float32)
    rows[1400] = rows[5]
    rows[1030] = rows[1029]
    assert near_duplicates(rows, np.ones(1500), 1.0) == {1030: 1029, 1400: 5}


def test_descriptor() -> None:
    image = _picture(0)
    vector = describe(image)
    assert vector.shape == (DIM,)
    assert vector.dtype == np.float32
    assert abs(np.linalg.norm(vector) - 1) < 1e-5
    assert describe(_recompressed(image, 80)) @ vector > 0.98
    assert np.isfinite(describe(np.zeros((5, 7, 3), np.uint8))).all()


def test_descriptor_tells_colours_and_directions_apart() -> None:
    x = np.broadcast_to(np.arange(64) // 8 % 2 * 200, (64, 64)).astype(np.uint8)
    across, down = np.stack([x] * 3, 2), np.stack([x.T] * 3, 2)
    edges = slice(192, None)
    same = describe(across)[edges] @ describe(across)[edges]
    assert abs(describe(across)[edges] @ describe(down)[edges]) < 0.05 * same
    red, green = (np.full((32, 32, 3), colour, np.uint8) for colour in ((200, 40, 40), (40, 160, 40)))
    assert describe(red) @ describe(green) < 0.5


def _by_pairs(rows: np.ndarray, aspects: np.ndarray, limits: np.ndarray) -> dict[int, int]:
    """The rule by its definition: the first earlier row that is kept and near enough."""
    found: dict[int, int] = {}
    for row in range(len(rows)):
        distances = np.sqrt(np.mean((rows[:row].astype(np.float64) - rows[row]) ** 2, axis=1))
        same = (distances <= np.minimum(limits[row], limits[:row])) & (
            np.abs(np.log(aspects[row] / aspects[:row])) <= 0.03
        )
        kept = [other for other in np.flatnonzero(same).tolist() if other not in found]
        if kept:
            found[row] = kept[0]
    return found


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_index_finds_what_comparing_all_pairs_finds(dtype: type) -> None:
    """Families of pictures that drift apart, at the limit and beyond, over more than one chunk."""
    rng = np.random.default_rng(0)
    families = rng.uniform(30, 220, (300, 48))
    rows = families[rng.integers(300, size=2500)] + rng.choice([0.5, 2, 4], (2500, 1)) * rng.normal(
        size=(2500, 48)
    )
    rows = np.round(rows).astype(dtype)
    aspects = rng.choice([1.0, 1.02, 1.5], 2500)
    limits = rng.choice([1.0, 3.0, 5.0], 2500)
    wanted = _by_pairs(rows, aspects, limits)
    assert 800 < len(wanted) < 2200
    assert near_duplicates(rows, aspects, limits) == wanted


def test_made_near_duplicates_are_all_found() -> None:
    """Recompressed, resized and darkened copies of 150 pictures, and no picture that is another."""
    originals = [_picture(seed) for seed in range(150)]
    copies = [_recompressed(picture, 92) for picture in originals]
    copies += [np.asarray(Image.fromarray(picture).resize((90, 90))) for picture in originals]
    copies += [(picture * 0.99).astype(np.uint8) for picture in originals]
    found = near_duplicates(_thumbnails(originals + copies).astype(np.uint8), np.ones(600), 3.0)
    assert found == {150 + row: row % 150 for row in range(450)}
