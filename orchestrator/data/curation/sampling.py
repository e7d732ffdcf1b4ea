"""Drawing evenly from clusters of unequal size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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
