"""Retrieval from seed sets: of each seed picture, the pictures of the pool that are nearest to it.

After DINOv2 (arXiv 2304.07193, section 3, "sample-based") and DINOv3 (arXiv 2508.10104, section 3.1). Every seed is
compared with every picture, by matrix products of tiles; what is nearest is then chosen by distances in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.curation.block_workers import BlockWorkers, ThreadWorkers
from orchestrator.data.curation.vectors import Floats, SomeVectors, Vectors

Rows = NDArray[np.int64]

# Bytes of a block of the pool, and pictures of it at least.
_BLOCK_BYTES = 8 << 20
_LEAST_ROWS = 64
# Seeds that are compared with a block at once, and that are looked for in one pass over the pool.
_TILE, _PASS = 1024, 1 << 16
# What float32 takes for nearer than it is stays among so many more candidates than are wanted.
_SPARE = 16


@dataclass(frozen=True)
class _Seeds:
    """What all pieces of a pass share: seeds (S, D), and how many candidates of each are kept."""

    seeds_SD: Floats
    count: int


def nearest_of_pool(
    vectors: Vectors,
    seeds: Rows,
    pool: Rows,
    per_seed: int,
    workers: BlockWorkers | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Rows:
    """The rows of the pool with the smallest Euclidean distance to each seed.

    Args:
        vectors: of all pictures.
        seeds: S rows.
        pool: P rows, ascending, in which no seed need be.
        per_seed: rows for each seed.
        workers: default: the processors of this process.
        stop: called now and then; raises to stop.

    Returns:
        (S, min(per_seed, P)) rows, nearest first; of equally near ones, the first.
    """
    wanted = min(per_seed, len(pool))
    workers = workers or ThreadWorkers()
    held = workers.share(SomeVectors(vectors, pool))
    size = max(_LEAST_ROWS, _BLOCK_BYTES // (4 * vectors.shape[1]))
    pieces = [(start, min(start + size, len(pool))) for start in range(0, len(pool), size)]
    found = [np.empty((0, wanted), np.int64)]
    for first in range(0, len(seeds), _PASS):
        some = seeds[first : first + _PASS]
        shared = _Seeds(vectors.take(some), min(wanted + _SPARE, len(pool)))
        best_SK: Floats | None = None
        rows_SK: Rows = np.empty((len(some), 0), np.int64)
        for distances_SK, places_SK in workers.run(_nearest, held, shared, pieces):
            stop()
            if best_SK is None:
                best_SK, rows_SK = distances_SK, places_SK
                continue
            best_SK, rows_SK = _smallest(
                np.concatenate([best_SK, distances_SK], axis=1),
                np.concatenate([rows_SK, places_SK], axis=1),
                shared.count,
            )
        found.append(_exactly(vectors, shared.seeds_SD, pool[rows_SK], wanted))
    return np.concatenate(found)


def _nearest(pool: Vectors, shared: _Seeds, piece: tuple[int, int]) -> tuple[Floats, Rows]:
    """Of each seed, the nearest of some rows of the pool: distances up to a constant, and places in the pool."""
    start, stop = piece
    block_PD = pool.read(start, stop)
    norms_P = np.einsum("pd,pd->p", block_PD, block_PD)
    count = min(shared.count, stop - start)
    distances, places = [], []
    for first in range(0, len(shared.seeds_SD), _TILE):
        tile_SP = shared.seeds_SD[first : first + _TILE] @ block_PD.T
        tile_SP *= -2
        tile_SP += norms_P
        nearest_SK = np.argpartition(tile_SP, count - 1, axis=1)[:, :count]
        distances.append(np.take_along_axis(tile_SP, nearest_SK, axis=1))
        places.append(nearest_SK + start)
    return np.concatenate(distances), np.concatenate(places)


def _smallest(distances_SK: Floats, places_SK: Rows, count: int) -> tuple[Floats, Rows]:
    """The smallest `count` of each row, the earlier place of equal ones: the same in whatever order blocks come."""
    by_place = np.argsort(places_SK, axis=1, kind="stable")
    distances_SK = np.take_along_axis(distances_SK, by_place, axis=1)
    places_SK = np.take_along_axis(places_SK, by_place, axis=1)
    order = np.argsort(distances_SK, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(distances_SK, order, axis=1), np.take_along_axis(places_SK, order, axis=1)


def _exactly(vectors: Vectors, seeds_SD: Floats, rows_SK: Rows, wanted: int) -> Rows:
    """The nearest of the candidates of each seed, by distances in float64."""
    rows_SK = np.sort(rows_SK, axis=1)
    chosen = np.empty((len(rows_SK), wanted), np.int64)
    for at, (seed_D, rows_K) in enumerate(zip(seeds_SD, rows_SK, strict=True)):
        away_KD = vectors.take(rows_K).astype(np.float64) - seed_D.astype(np.float64)
        order = np.argsort(np.einsum("kd,kd->k", away_KD, away_KD), kind="stable")
        chosen[at] = rows_K[order[:wanted]]
    return chosen
