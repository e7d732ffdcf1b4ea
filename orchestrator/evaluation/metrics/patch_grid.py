"""Between a map of patches and what is known of every pixel: means and shares of patches, and maps made larger."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from orchestrator.data.dense import DensePictures, Target
from orchestrator.evaluation.metric import Features

Floats = NDArray[np.float64]

_BATCH = 8
_CHANNELS = 64


def maps_of(
    features: Features, pictures: DensePictures, rows: NDArray[np.int64], size: int
) -> Iterator[tuple[NDArray[np.float32], Target]]:
    """Patch features (h, w, D) and target of each of these pictures; a few are in memory at a time."""
    assert features.maps is not None, "`evaluate` gives it"
    squares = pictures.squares(rows, size, features.check)
    while batch := list(islice(squares, _BATCH)):
        maps_BhwD = features.maps(np.stack([image for image, _ in batch]))
        yield from zip(maps_BhwD, (target for _, target in batch), strict=True)


def patch_of_pixel(side: int, num_patches: int) -> NDArray[np.int64]:
    """Which of the patches along an edge a pixel is in, (side,)."""
    return np.arange(side) * num_patches // side


def class_counts(classes_HW: NDArray[np.int64], grid: tuple[int, int], num_classes: int) -> NDArray[np.int64]:
    """How many pixels of each class each patch has, (h·w, C); pixels of class -1 do not count."""
    rows, columns = (patch_of_pixel(side, count) for side, count in zip(classes_HW.shape, grid, strict=True))
    patch_HW = rows[:, None] * grid[1] + columns
    there = classes_HW >= 0
    flat = np.bincount(
        patch_HW[there] * num_classes + classes_HW[there], minlength=grid[0] * grid[1] * num_classes
    )
    return flat.reshape(-1, num_classes)


def mean_where(
    values_HW: NDArray[np.floating[Any]], there_HW: NDArray[np.bool_], grid: tuple[int, int]
) -> Floats:
    """The mean of each patch's pixels that count, (h·w,); nan where none does."""
    rows, columns = (patch_of_pixel(side, count) for side, count in zip(values_HW.shape, grid, strict=True))
    patch = (rows[:, None] * grid[1] + columns)[there_HW]
    size = grid[0] * grid[1]
    sums = np.bincount(patch, values_HW[there_HW].astype(np.float64), size)
    counts = np.bincount(patch, minlength=size)
    found: Floats = np.full(size, np.nan)
    np.divide(sums, counts, out=found, where=counts > 0)
    return found


def enlarged(map_hwC: NDArray[np.floating[Any]], shape: tuple[int, int]) -> NDArray[np.float32]:
    """A map at (H, W, C), bilinear between the centres of patches."""
    flat = np.ascontiguousarray(map_hwC, dtype=np.float32)
    # OpenCV takes up to 128 channels, and drops the last axis of one.
    parts = [
        cv2.resize(flat[..., at : at + _CHANNELS], shape[::-1], interpolation=cv2.INTER_LINEAR).reshape(
            *shape, -1
        )
        for at in range(0, flat.shape[-1], _CHANNELS)
    ]
    return np.concatenate(parts, axis=-1)


def centres(grid: tuple[int, ...], size: int) -> Floats:
    """x and y of the middle of each patch of a square, in pixels from its corner, (h·w, 2)."""
    ys, xs = ((np.arange(count) + 0.5) * size / count for count in grid)
    return np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)


def side_for(size: int, patch: int) -> int:
    """The side nearest to `size` that patches fill, at least one patch."""
    return max(1, round(size / patch)) * patch
