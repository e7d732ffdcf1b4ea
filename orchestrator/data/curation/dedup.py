"""Pictures that look the same as another one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.curation.near_index import NearIndex, PrincipalAxes
from orchestrator.data.rng import generator

_ROWS = 1024
# Pictures that one is compared with at once, and by how much the logarithms of their aspect ratios may differ.
_AT_ONCE = 64
_ASPECT = 0.03
# Pictures whose nearest other one is looked for, and the fewest of a dataset that say what is usual in it.
_ASKED = 256
_LEAST = 4
_USUAL = 0.75
# Share of a dataset that is worth a warning, and the pairs that it names.
_MANY = 0.1
_NAMED = 3
_LISTED = 100


def usual_distance(thumbnails_ND: NDArray[Any], rng: np.random.Generator) -> float | None:
    """How far the pictures of a dataset usually are from the most similar other one; None of fewer than four.

    It is the third quartile of the distances to the nearest neighbour, so that up to three quarters of the pictures may
    have a near duplicate. Where a camera stands still it is small, and what is a near duplicate elsewhere may be all
    that there is to learn.

    Args:
        thumbnails_ND: flattened thumbnails of one dataset, in grey levels.
        rng: draws whose nearest neighbour is looked for, at most 256.

    Returns:
        A root mean square difference, in grey levels.
    """
    count = len(thumbnails_ND)
    if count < _LEAST:
        return None
    asked = np.sort(rng.permutation(count)[:_ASKED])
    best = np.full(len(asked), np.inf)
    mine = thumbnails_ND[asked].astype(np.float32)
    squares = np.einsum("nd,nd->n", mine, mine, dtype=np.float64)
    nearest = np.zeros(len(asked), dtype=np.int64)
    for start in range(0, count, _ROWS):
        part = thumbnails_ND[start : start + _ROWS].astype(np.float32)
        others = np.einsum("nd,nd->n", part, part, dtype=np.float64)
        found = squares[:, None] + others[None] - 2 * (mine @ part.T)
        inside = np.flatnonzero((asked >= start) & (asked < start + len(part)))
        found[inside, asked[inside] - start] = np.inf
        at = found.argmin(axis=1)
        better = found[np.arange(len(asked)), at] < best
        best[better], nearest[better] = found[better, at[better]], at[better] + start
    # The expanded square loses digits in float32: it finds the neighbour, the exact difference is the distance.
    differences = mine.astype(np.float64) - thumbnails_ND[nearest]
    return float(np.quantile(np.sqrt(np.mean(differences**2, axis=1)), _USUAL))


@dataclass(frozen=True)
class NearLimit:
    """How near two pictures of a dataset have to be to count as the same, and what came of that.

    Attributes:
        source: the dataset.
        pictures: its unique pictures, before.
        usual: see :func:`usual_distance`.
        limit: root mean square difference in grey levels, the smaller one of the two that the user set.
        dropped: pairs of dropped and kept pictures, by name.
        spared: pictures that are within the absolute limit of another one, and are kept because that is usual here.
        examples: pairs of those, by name.
    """

    source: str
    pictures: int
    usual: float | None
    limit: float
    dropped: tuple[tuple[str, str], ...] = ()
    spared: int = 0
    examples: tuple[tuple[str, str], ...] = ()

    def record(self) -> dict[str, Any]:
        """Plain JSON for the report: limits, counts and the first pairs."""
        return {
            "pictures": self.pictures,
            "usual_distance": self.usual and round(self.usual, 4),
            "limit": round(self.limit, 4),
            "dropped": len(self.dropped),
            "dropped_pairs": [list(pair) for pair in self.dropped[:_LISTED]],
            "spared": self.spared,
            "spared_pairs": [list(pair) for pair in self.examples],
        }

    def warning(self) -> str | None:
        """A warning where many pictures are dropped, or spared; None otherwise."""
        if self.spared > _MANY * self.pictures:
            return (
                f"{self.source}: {self.spared:,} of {self.pictures:,} pictures look nearly like another one, and are "
                f"kept: in this dataset the nearest picture is usually {self.usual:.2g} grey levels away, as where a "
                f"camera stands still; such as {_pairs(self.examples)}. `near_duplicate_relative: null` drops them"
            )
        if len(self.dropped) > _MANY * self.pictures:
            return (
                f"{self.source}: {len(self.dropped):,} of {self.pictures:,} pictures are dropped because they look "
                f"nearly like another one, within {self.limit:.2g} grey levels; such as {_pairs(self.dropped)}. If "
                "they differ in what matters, set a smaller `near_duplicate`; 0 keeps them"
            )
        return None


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    return "; ".join(f"{one} and {other}" for one, other in pairs[:_NAMED])


def drop_near_duplicates(
    thumbnails_ND: NDArray[Any],
    aspects_N: NDArray[np.float64],
    names: Sequence[tuple[str, str]],
    rms: float,
    relative: float | None,
) -> tuple[dict[int, int], list[NearLimit]]:
    """The near duplicates of several datasets, with a limit for each.

    Args:
        thumbnails_ND, aspects_N: see :func:`near_duplicates`.
        names: dataset and path of each picture.
        rms: the largest limit.
        relative: the largest limit as a share of what is usual in a dataset, see :func:`usual_distance`; None: `rms`
            is the limit of all.

    Returns:
        Row of the kept picture by row of the dropped one, and the limits with what came of them.
    """
    rows_of: dict[str, list[int]] = {}
    for row, (source, _) in enumerate(names):
        rows_of.setdefault(source, []).append(row)
    limits_N = np.full(len(names), rms, np.float64)
    usual = {}
    for source, rows in rows_of.items():
        usual[source] = (
            None if relative is None else usual_distance(thumbnails_ND[rows], generator(0, "near"))
        )
        if relative is not None and (found := usual[source]) is not None:
            limits_N[rows] = min(rms, relative * found)
    kept_as = near_duplicates(thumbnails_ND, aspects_N, limits_N)

    def named(pairs: Mapping[int, int]) -> tuple[tuple[str, str], ...]:
        return tuple((names[row][1], "/".join(names[other])) for row, other in pairs.items())

    told = []
    for source, rows in rows_of.items():
        limit = float(limits_N[rows[0]])
        dropped = {row: kept_as[row] for row in rows if row in kept_as}
        spared: dict[int, int] = {}
        if limit < rms:
            found_within = near_duplicates(thumbnails_ND[rows], aspects_N[rows], rms)
            spared = {
                rows[row]: rows[other] for row, other in found_within.items() if rows[row] not in dropped
            }
        told.append(
            NearLimit(
                source, len(rows), usual[source], limit, named(dropped), len(spared), named(spared)[:_NAMED]
            )
        )
    return kept_as, told


def near_duplicates(
    thumbnails_ND: NDArray[Any], aspects_N: NDArray[np.float64], rms: float | NDArray[np.float64]
) -> dict[int, int]:
    """Pictures that look the same as an earlier one.

    Every picture is compared with the earlier pictures that were kept, never with ones already dropped: a
    slow drift through many pictures cannot merge its two ends. An index says which kept pictures may be near enough,
    and leaves none out, so the result is that of comparing all pairs.

    Args:
        thumbnails_ND: flattened thumbnails, in grey levels.
        aspects_N: width ÷ height; pictures whose aspect ratios differ by more than 3 % are never the same.
        rms: largest root mean square difference between thumbnails of the same picture, in grey levels; of all
            pictures, or of each (N,). For a pair the smaller one counts.

    Returns:
        Row of the kept picture by row of the dropped one.
    """
    kept_as: dict[int, int] = {}
    total, dim = thumbnails_ND.shape
    limits_N = np.broadcast_to(np.asarray(rms, np.float64), total)
    project, index = PrincipalAxes(thumbnails_ND), NearIndex()
    for start in range(0, total, _ROWS):
        rows_n = np.arange(start, min(start + _ROWS, total))
        points_nM, radii_n = project(thumbnails_ND[rows_n]), limits_N[rows_n] * math.sqrt(dim)
        own = NearIndex()
        own.add(rows_n, points_nM)
        earlier, beside = index.near(points_nM, radii_n), own.near(points_nM, radii_n)
        for row, before, here in zip(rows_n.tolist(), earlier, beside, strict=True):
            others = [
                *before.tolist(),
                *(other for other in here[here < row].tolist() if other not in kept_as),
            ]
            same = _first_same(thumbnails_ND, aspects_N, limits_N, row, others)
            if same is not None:
                kept_as[row] = same
        kept_n = np.array([row for row in rows_n.tolist() if row not in kept_as], dtype=np.int64)
        index.add(kept_n, points_nM[kept_n - start])
    return kept_as


def _first_same(
    thumbnails_ND: NDArray[Any],
    aspects_N: NDArray[np.float64],
    limits_N: NDArray[np.float64],
    row: int,
    others: Sequence[int],
) -> int | None:
    """The first of other pictures that is the same as one, exactly."""
    mine_D = thumbnails_ND[row].astype(np.float64)
    for start in range(0, len(others), _AT_ONCE):
        some_n = np.array(others[start : start + _AT_ONCE])
        some_n = some_n[np.abs(np.log(aspects_N[row] / aspects_N[some_n])) <= _ASPECT]
        distances_n = np.sqrt(np.mean((mine_D - thumbnails_ND[some_n]) ** 2, axis=1))
        same_n = some_n[distances_n <= np.minimum(limits_N[row], limits_N[some_n])]
        if len(same_n):
            return int(same_n[0])
    return None
