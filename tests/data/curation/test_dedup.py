"""Near duplicates, and the descriptor that clusters are made of."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from orchestrator.data.curation.dedup import near_duplicates
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
