from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.evaluation.report.clusters import cluster_shares
from orchestrator.evaluation.report.figures import COLORS


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])


def heights(path: Path, color: str) -> np.ndarray:
    """The mean line of the picture, by column, in which a colour stands; nan where it does not."""
    with Image.open(path) as image:
        here = (np.abs(np.asarray(image.convert("RGB")).astype(int) - rgb(color)) <= 12).all(axis=-1)
    rows = np.arange(here.shape[0])[:, None]
    with np.errstate(invalid="ignore"):
        return (here * rows).sum(0) / np.where(here.sum(0), here.sum(0), np.nan)


def test_clusters_are_sorted_by_the_first_series(tmp_path: Path) -> None:
    """Drawn as the pool is: from the highest step on the left to the lowest on the right, whatever the order."""
    pool = [1, 100, 10, 1000]
    cluster_shares({"of it": {"raw": pool, "chosen": [1] * 4, "drawn": pool}}, tmp_path / "a.png")
    line = heights(tmp_path / "a.png", COLORS[1])
    # The legend has the colour, too: it stands in the right half, and above.
    width = len(line)
    left, right = np.nanmean(line[: width // 4]), np.nanmax(line[-width // 8 :])
    assert left + 100 < right


def test_a_cluster_that_nobody_draws_is_a_gap_and_no_crash(tmp_path: Path) -> None:
    cluster_shares({"of it": {"raw": [5, 3, 2], "chosen": [1, 1, 0], "drawn": [1, 0, 0]}}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as one:
        size = one.size
    panels = {name: {"raw": [5, 3], "drawn": [1, 1]} for name in ("before", "now")}
    cluster_shares(panels, tmp_path / "b.png", columns=2)
    with Image.open(tmp_path / "b.png") as two:
        assert two.size == (2 * size[0], size[1])


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no clusters to draw"):
        cluster_shares({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no counts of one length to draw for 'of it'"):
        cluster_shares({"of it": {"raw": [1, 2], "drawn": [1]}}, tmp_path / "a.png")
