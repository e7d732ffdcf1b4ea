"""A cheap classical description of a picture: what colours are where, and which way its edges run.

A stand-in for a trained encoder's embedding: it groups pictures by look and layout, not by what they show. It
needs no weights, so a first curation can run before anything was trained.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

LAB_GRID = 8
HOG_SIDE = 64
HOG_CELL = 16
HOG_BINS = 9
DIM = LAB_GRID**2 * 3 + (HOG_SIDE // HOG_CELL) ** 2 * HOG_BINS


def describe(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The descriptor of one uint8 RGB picture, (336,) float32 of unit length.

    Half of its energy is an 8×8 CIE Lab thumbnail (centred on mid-grey), the other half a histogram of
    oriented gradients of the 64×64 grey picture: 4×4 cells, 9 unsigned directions (Dalal and Triggs 2005,
    with one normalisation over the whole picture, clipped at 0.2). The aspect ratio is ignored.
    """
    both = np.concatenate([_unit(_colours(image_HWC)), _unit(_edges(image_HWC))])
    return _unit(both).astype(np.float32)


def thumbnail(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """A picture averaged down to (side, side, 3), in grey levels 0 to 255."""
    small = cv2.resize(image_HWC, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32)


def _colours(image_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    lab = np.asarray(cv2.cvtColor(thumbnail(image_HWC, LAB_GRID) / 255, cv2.COLOR_RGB2LAB), dtype=np.float64)
    # Lightness runs from 0 to 100, a and b stay within about ±50 in photographs.
    return np.asarray((lab - np.array([50.0, 0.0, 0.0])) / 50).reshape(-1)


def _edges(image_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    gray = cv2.cvtColor(thumbnail(image_HWC, HOG_SIDE) / 255, cv2.COLOR_RGB2GRAY)
    dx, dy = cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)
    strength = np.hypot(dx, dy).reshape(-1).astype(np.float64)
    direction = (np.arctan2(dy, dx).reshape(-1) / np.pi * HOG_BINS) % HOG_BINS
    low = np.floor(direction).astype(np.int64) % HOG_BINS
    share = direction - np.floor(direction)
    rows, columns = np.divmod(np.arange(HOG_SIDE**2), HOG_SIDE)
    cell = rows // HOG_CELL * (HOG_SIDE // HOG_CELL) + columns // HOG_CELL
    size = (HOG_SIDE // HOG_CELL) ** 2 * HOG_BINS
    histogram = np.zeros(size)
    # Each gradient is shared between its two nearest directions.
    histogram += np.bincount(cell * HOG_BINS + low, strength * (1 - share), size)
    histogram += np.bincount(cell * HOG_BINS + (low + 1) % HOG_BINS, strength * share, size)
    return np.minimum(_unit(histogram), 0.2)


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
