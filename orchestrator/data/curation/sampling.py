"""Removing repeated pictures, and drawing evenly from clusters of unequal size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROWS = 1024


def near_duplicates(
    thumbnails_ND: NDArray[np.float32], aspects_N: NDArray[np.float64], rms: float
) -> dict[int, int]:
    """Pictures that look the same as an earlier one.

    Every picture is compared with the earlier pictures that were kept, never with ones already dropped: a
    slow drift through many pictures cannot merge its two ends. Takes O(N²·D) arithmetic.

    Args:
        thumbnails_ND: flattened thumbnails, in grey levels.
        aspects_N: width ÷ height; pictures whose aspect ratios differ by more than 3 % are never the same.
        rms: largest root mean square difference between thumbnails of the same picture, in grey levels.

    Returns:
        Row of the kept picture by row of the dropped one.
    """
    kept_as: dict[int, int] = {}
    squares = np.einsum("nd,nd->n", thumbnails_ND, thumbnails_ND, dtype=np.float64)
    for start in range(0, len(thumbnails_ND), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(thumbnails_ND)))
        products = thumbnails_ND[rows] @ thumbnails_ND[: rows[-1] + 1].T
        distances = squares[rows, None] + squares[None, : rows[-1] + 1] - 2 * products
        # The expanded square loses digits in float32: it preselects, the exact difference decides.
        limit = (rms**2 + 1.0) * thumbnails_ND.shape[1] + 1e-5 * squares[rows, None]
        for row, near in zip(rows, distances <= limit, strict=True):
            for other in np.flatnonzero(near[:row]):
                if int(other) not in kept_as and _same(thumbnails_ND, aspects_N, int(row), int(other), rms):
                    kept_as[int(row)] = int(other)
                    break
    return kept_as


def _same(
    thumbnails_ND: NDArray[np.float32], aspects_N: NDArray[np.float64], row: int, other: int, rms: float
) -> bool:
    if abs(np.log(aspects_N[row] / aspects_N[other])) > 0.03:
        return False
    difference = thumbnails_ND[row].astype(np.float64) - thumbnails_ND[other]
    return bool(np.sqrt(np.mean(difference**2)) <= rms)


def fill(sizes: Sequence[int], target: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How many to take of each cluster so that small ones are emptied before large ones give more.

    The balanced sampling of Vo et al. (arXiv 2405.15613, section 3.3) on one level: clusters give min(cut,
    size) with the one cut for which the total is `target`; where no whole cut gives it, clusters drawn by
    `rng` give one more.

    Args:
        sizes: number of pictures by cluster.
        target: 0 ≤ target ≤ sum(sizes).
        rng: draws the clusters that give the remainder.

    Returns:
        (len(sizes),) int64 that sums to `target`.
    """
    limits = np.asarray(sizes, dtype=np.int64)
    assert 0 <= target <= limits.sum(), f"cannot take {target} of {limits.sum()}"
    taken = np.zeros_like(limits)
    left = target
    while left > 0:
        open_clusters = np.flatnonzero(taken < limits)
        each = left // len(open_clusters)
        if each == 0:
            taken[rng.permutation(open_clusters)[:left]] += 1
            break
        # Whatever small clusters cannot give is shared out again among the others.
        added = np.minimum(each, limits[open_clusters] - taken[open_clusters])
        taken[open_clusters] += added
        left -= int(added.sum())
    return taken
