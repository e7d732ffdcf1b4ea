"""Photographs for a storm that needs no network."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures, all different."""
    folder = tmp_path_factory.mktemp("photos")
    chance = np.random.default_rng(0)
    for number in range(60):
        coarse = chance.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        noise = chance.integers(0, 40, (128, 160, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (160, 128), interpolation=cv2.INTER_CUBIC) // 2 + noise
        cv2.imwrite(str(folder / f"{number:02}.jpg"), pixels)
    return folder
