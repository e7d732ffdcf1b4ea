"""Which earlier vectors may lie within a distance: an index that leaves none out.

Vectors are projected onto a few orthonormal directions in which they differ most. No projection is longer than its
vector, so whatever lies within a distance lies within it after projection, too; what else does is for an exact look to
tell. Points of few dimensions are found by k-d trees, of which there are as many as a binary number has digits: a new
one is made of all that are no larger, as in Bentley and Saxe 1980.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

_DIRECTIONS = 12
_SAMPLE = 1024
_PASSES = 3
# What rounding may make of a distance, relative to the longest vector.
_SLACK = 1e-9


class PrincipalAxes:
    """Orthonormal directions in which vectors differ most, found on some of them.

    Args:
        vectors_ND: all of them, of any type of number.
    """

    def __init__(self, vectors_ND: NDArray[Any]) -> None:
        every = max(1, len(vectors_ND) // _SAMPLE)
        sample_ND = vectors_ND[::every][:_SAMPLE].astype(np.float64)
        self._centre_D = sample_ND.mean(0) if len(sample_ND) else np.zeros(vectors_ND.shape[1])
        sample_ND -= self._centre_D
        dim = vectors_ND.shape[1]
        # Any directions give the same result, so a few passes towards the best ones are enough.
        directions_DM = np.random.default_rng(0).normal(size=(dim, min(_DIRECTIONS, dim)))
        for _ in range(_PASSES):
            directions_DM = np.linalg.qr(sample_ND.T @ (sample_ND @ directions_DM) + 1e-9 * directions_DM)[0]
        self._directions_DM = directions_DM

    def __call__(self, vectors_nD: NDArray[Any]) -> Doubles:
        """The points (n, M) of vectors."""
        points_nM = (vectors_nD.astype(np.float64) - self._centre_D) @ self._directions_DM
        return np.asarray(points_nM, dtype=np.float64)


class NearIndex:
    """Points that can be asked for by distance, and added to."""

    def __init__(self) -> None:
        self._parts: list[tuple[Any, Ints, Doubles]] = []
        self._longest = 0.0

    def add(self, rows_n: Ints, points_nM: Doubles) -> None:
        """More points, and the numbers that they are known by."""
        from sklearn.neighbors import KDTree

        if not len(rows_n):
            return
        self._longest = max(self._longest, float(np.abs(points_nM).max()))
        while self._parts and len(self._parts[-1][1]) <= len(rows_n):
            _, others_n, more_nM = self._parts.pop()
            rows_n, points_nM = np.concatenate([others_n, rows_n]), np.concatenate([more_nM, points_nM])
        self._parts.append((KDTree(points_nM), rows_n, points_nM))

    def near(self, points_nM: Doubles, radii_n: Doubles) -> list[Ints]:
        """For each point, the numbers of all that lie within its radius, ascending, and a few that lie just outside."""
        longest = max(self._longest, float(np.abs(points_nM).max(initial=0.0)))
        found: list[list[Ints]] = [[] for _ in points_nM]
        for tree, rows_n, _ in self._parts:
            for mine, places in zip(
                found, tree.query_radius(points_nM, radii_n + _SLACK * longest), strict=True
            ):
                mine.append(rows_n[places])
        return [np.sort(np.concatenate(mine)) if mine else np.empty(0, np.int64) for mine in found]
