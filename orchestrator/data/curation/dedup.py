"""Pictures that look the same as another one."""

from __future__ import annotations

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
