from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.evaluation.report.text_maps import text_maps


def bright(path: Path) -> np.ndarray:
    """Where the picture shows the bright end of the colours, warm and pale."""
    with Image.open(path) as image:
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")).astype(int), -1, 0)
    return (red > 240) & (green > 150) & (blue < 230) & (red - blue > 40)


def test_each_prompt_lights_up_where_it_is_and_has_its_own_scale(tmp_path: Path) -> None:
    photos = [np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 90, np.uint8)]
    maps = [np.tile([0.0, -0.5], (4, 4, 1)) for _ in photos]
    maps[0][:, :2, 0] = 0.9  # the first text: left half of the first photo
    maps[1][:, 2:, 1] = -0.498  # the second: right half of the second photo, however small the difference
    text_maps(photos, maps, ["one", "two"], tmp_path / "maps.png")
    lit = bright(tmp_path / "maps.png")
    rows, columns = np.nonzero(lit)
    third = lit.shape[1] / 3
    first = columns < 2 * third
    assert ((columns[first] > third) & (columns[first] < 1.6 * third)).all()
    assert (columns[~first] > 2.4 * third).all()
    # The first photo is above the second.
    assert rows[first].max() < rows[~first].min()


def test_equal_patches_show_no_structure(tmp_path: Path) -> None:
    noise = 1e-9 * np.random.default_rng(0).normal(size=(4, 4, 1))
    text_maps([np.zeros((8, 8, 3), np.uint8)], [0.3 + noise], ["one"], tmp_path / "maps.png")
    assert not bright(tmp_path / "maps.png").any()


def test_what_does_not_pair_up_is_refused(tmp_path: Path) -> None:
    photo = np.zeros((8, 8, 3), np.uint8)
    for photos, maps, prompts in (
        ([], [], ["a"]),
        ([photo], [np.zeros((2, 2, 0))], []),
        ([photo], [np.zeros((2, 2, 1))], ["a", "b"]),
        ([photo, photo], [np.zeros((2, 2, 1))], ["a"]),
    ):
        with pytest.raises(ValueError, match="but maps of"):
            text_maps(photos, maps, prompts, tmp_path / "maps.png")
