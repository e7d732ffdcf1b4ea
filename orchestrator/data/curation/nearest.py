"""The nearest of many centres for each of many vectors, by tiles of matrix products.

Of all c, the one nearest to x has the largest x·c - ‖c‖²/2. With a 1 behind each vector and -‖c‖²/2 behind each centre
that is one product, and nothing is added to a tile afterwards. Where that is written, E is D + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# A tile of products stays in a processor's second cache.
_TILE_ROWS, _TILE_CENTRES = 256, 1024
# Below so many centres, comparing with all of them costs no more than choosing some.
_FEW = 128
# How many centres around its own a row may move to, and above which share of all it is not worth choosing.
_NEIGHBOURS = 24
_WORTH_IT = 0.6
_GROUPING_PASSES = 3


def with_norms(centres_KD: Floats) -> Floats:
    """(K, E): the centres with what :func:`nearest` needs behind them."""
    norms_K = np.einsum("kd,kd->k", centres_KD, centres_KD, dtype=np.float64)
    return np.concatenate([centres_KD, (-norms_K / 2)[:, None].astype(np.float32)], axis=1)


def nearest(rows_nE: Floats, centres_KE: Floats) -> tuple[Ints, Floats]:
    """The nearest centre of each row, the first of equally near ones.

    Args:
        rows_nE: vectors with a 1 behind each.
        centres_KE: from :func:`with_norms`.

    Returns:
        Its number, and x·c - ‖c‖²/2, which is (‖x‖² - ‖x - c‖²) / 2.
    """
    total, num_centres = len(rows_nE), len(centres_KE)
    labels_n, scores_n = np.zeros(total, np.int32), np.full(total, -np.inf, np.float32)
    # Tiles of about the same size: a last one of a few rows would be slow.
    rows = math.ceil(total / max(1, round(total / _TILE_ROWS)))
    columns = math.ceil(num_centres / math.ceil(num_centres / _TILE_CENTRES))
    tile = np.empty(rows * columns, np.float32)
    for first in range(0, num_centres, columns):
        centres_EK = centres_KE[first : first + columns].T
        for start in range(0, total, rows):
            part_nE = rows_nE[start : start + rows]
            shape = len(part_nE), centres_EK.shape[1]
            scores = tile[: shape[0] * shape[1]].reshape(shape)
            np.matmul(part_nE, centres_EK, out=scores)
            best_n = scores.argmax(1)
            found_n = scores[np.arange(len(best_n)), best_n]
            better_n = found_n > scores_n[start : start + rows]
            labels_n[start : start + rows][better_n] = best_n[better_n] + first
            scores_n[start : start + rows][better_n] = found_n[better_n]
    return labels_n, scores_n


@dataclass(frozen=True)
class Around:
    """Groups of centres that lie near each other, and of each group all centres around it.

    Attributes:
        group_K: the group of each centre.
        members: of each group, the numbers of the centres that are in it or near one that is.
    """

    group_K: Ints
    members: tuple[Ints, ...]

    @classmethod
    def of(cls, centres_KD: Floats) -> Around | None:
        """The groups of centres; None where it is not worth while."""
        num_centres = len(centres_KD)
        if num_centres < _FEW:
            return None
        ones_KE = np.concatenate([centres_KD, np.ones((num_centres, 1), np.float32)], axis=1)
        group_K = _groups(centres_KD, ones_KE, round(math.sqrt(num_centres)))
        near_KM = _neighbours(ones_KE, with_norms(centres_KD))
        members = tuple(
            np.unique(near_KM[group_K == group]).astype(np.int32) for group in range(int(group_K.max()) + 1)
        )
        sizes_G = np.bincount(group_K)
        cost = sum(len(found) * size for found, size in zip(members, sizes_G, strict=True)) / num_centres
        return cls(group_K, members) if cost < _WORTH_IT * num_centres else None

    def nearest(self, rows_nE: Floats, centres_KE: Floats, labels_n: Ints) -> tuple[Ints, Floats]:
        """As :func:`nearest`, among the centres around each row's present one."""
        found_n, scores_n = np.empty_like(labels_n), np.empty(len(labels_n), np.float32)
        groups_n = self.group_K[labels_n]
        order_n = np.argsort(groups_n, kind="stable")
        breaks = np.flatnonzero(np.diff(groups_n[order_n])) + 1
        for rows_m in np.split(order_n, breaks):
            if not len(rows_m):
                continue
            members = self.members[groups_n[rows_m[0]]]
            best_m, scores_n[rows_m] = nearest(rows_nE[rows_m], centres_KE[members])
            found_n[rows_m] = members[best_m]
        return found_n, scores_n


def _groups(centres_KD: Floats, ones_KE: Floats, num_groups: int) -> Ints:
    """Groups of centres, by a few passes of k-means from evenly spaced ones."""
    means_GD = centres_KD[np.linspace(0, len(centres_KD) - 1, num_groups).astype(np.int64)]
    for _ in range(_GROUPING_PASSES):
        labels_K, _ = nearest(ones_KE, with_norms(means_GD))
        counts_G = np.bincount(labels_K, minlength=num_groups)[:, None]
        # There are few groups, so a product with ones and zeros is the fastest sum.
        sums_GD = (labels_K == np.arange(num_groups)[:, None]).astype(np.float32) @ centres_KD
        means_GD = np.where(counts_G > 0, sums_GD / np.maximum(counts_G, 1), means_GD).astype(np.float32)
    return nearest(ones_KE, with_norms(means_GD))[0]


def _neighbours(ones_KE: Floats, centres_KE: Floats) -> NDArray[np.int64]:
    """(K, M): of each centre the nearest ones, itself among them."""
    most = min(_NEIGHBOURS + 1, len(centres_KE))
    found = np.empty((len(centres_KE), most), np.int64)
    for start in range(0, len(centres_KE), _TILE_ROWS):
        scores = ones_KE[start : start + _TILE_ROWS] @ centres_KE.T
        found[start : start + _TILE_ROWS] = np.argpartition(scores, -most, axis=1)[:, -most:]
    return found
