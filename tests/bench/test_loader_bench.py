"""What `python -m bench loader` compares: the same crops by both arms, and arithmetic by hand; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import loader
from bench.harness import Arm
from orchestrator.data.image_cache import ImageCache


def test_both_arms_make_as_many_crops_of_the_same_sizes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(8):
        pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    block = loader.Photos(tmp_path, loader.CropConfig(), 8)().load(0, 0)
    loader.mend_torchvision()
    published = loader._Published(sorted(tmp_path.iterdir()))
    large, small = loader._stacked([published[0], published[1]])
    for ours, theirs in (("globals", large), ("locals", small)):
        assert block.arrays[ours][:, :2].shape == tuple(theirs.shape)
    assert loader._ours(tmp_path)() > 0


def test_the_first_epoch_finds_nothing_in_the_cache_and_later_ones_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "_SIDE", 32)
    photos, kept = tmp_path / "photos", tmp_path / "kept"
    photos.mkdir()
    for number in range(8):
        Image.new("RGB", (80, 60), (30 * number, 0, 0)).save(photos / f"{number}.jpg")
    put: list[bytes] = []
    plain = ImageCache.put
    monkeypatch.setattr(ImageCache, "put", lambda self, key, data: (put.append(key), plain(self, key, data)))
    first = loader._first_epoch(photos, tmp_path)
    assert min(first(), first()) > 0
    assert len(put) == 16
    later = loader._ours(photos, kept)
    assert len(put) == 24
    assert min(later(), later()) > 0
    assert len(put) == 24


def test_arithmetic_of_cores_a_gpu() -> None:
    (small, large, giant) = loader._arithmetic({"500 x 375": Arm(5.0, 5.0, 5.0, 1)})
    assert large.startswith("ViT-L, 159 images/s on an H100: cores a GPU 500 x 375: 0.8")
    assert small.startswith("ViT-S, 2,230 images/s on an H100: cores a GPU 500 x 375: 11.2")
    assert giant.startswith("7B, 7 images/s")
