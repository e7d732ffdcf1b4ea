"""A picture of the clusters: a few photographs of each, most typical first."""

from __future__ import annotations

import contextlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.bands import shown_rgb
from orchestrator.data.curation.components import CHOSEN
from orchestrator.data.decode import Pixels, UnreadableImage, read_rgb
from orchestrator.data.index import ImageIndex

_SIDE = 88
_GAP = 6
_CAPTION = 132
_INK, _FAINT = (40, 40, 40), (120, 120, 120)


def draw_clusters(
    index: ImageIndex, distances_N: NDArray[np.float64], path: Path, columns: int = 9, most: int = 40
) -> None:
    """Writes a PNG with one line for each of the `most` largest clusters.

    Args:
        index: the photographs with their clusters.
        distances_N: distance of each to its cluster's centre; the nearest are shown.
        path: the file to write.
        columns: photographs a line.
        most: lines.
    """
    clusters, chosen = index.clusters, index.rows_of(CHOSEN)
    taken_N = np.zeros(len(index), np.bool_)
    taken_N[chosen] = True
    numbers = np.unique(clusters)[:most]
    height = _GAP + len(numbers) * (_SIDE + _GAP)
    sheet = np.full((height, _CAPTION + columns * (_SIDE + _GAP), 3), 255, dtype=np.uint8)
    for line, number in enumerate(numbers):
        top = _GAP + line * (_SIDE + _GAP)
        rows = np.flatnonzero(clusters == number)
        taken = int(taken_N[rows].sum())
        _write(sheet, f"cluster {number}", top + 34, _INK)
        _write(sheet, f"{len(rows)} photos", top + 54, _FAINT)
        _write(sheet, f"{taken} taken", top + 72, _FAINT)
        for column, row in enumerate(rows[np.argsort(distances_N[rows], kind="stable")][:columns]):
            left = _CAPTION + column * (_SIDE + _GAP)
            # A file that went in the meantime leaves its place white.
            with contextlib.suppress(UnreadableImage):
                picture = _square(_shown(index, int(row)))
                sheet[top : top + _SIDE, left : left + _SIDE] = picture
    written, data = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    assert written, "OpenCV could not encode a PNG"
    path.write_bytes(data.tobytes())


def _shown(index: ImageIndex, row: int) -> Pixels:
    """A picture as it is shown, in 8 bits and three of its bands."""
    pixels = index.pixels(row)
    return shown_rgb(read_rgb(index.path(row), _SIDE, index[row].max_pixels, pixels), pixels)


def _square(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width, _ = image_HWC.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = image_HWC[top : top + side, left : left + side]
    return np.asarray(cv2.resize(middle, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _write(sheet: NDArray[np.uint8], text: str, baseline: int, ink: tuple[int, int, int]) -> None:
    cv2.putText(sheet, text, (10, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.48, ink, 1, cv2.LINE_AA)
