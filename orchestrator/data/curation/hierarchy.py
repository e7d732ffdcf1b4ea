"""Hierarchical k-means with resampling, after Vo et al. 2024 (arXiv 2405.15613, section 3.2).

k-means puts many centres where there are many pictures. Clusters of clusters do so less: the finest centres are the
vectors of the next level, and each counts as one, however many pictures it stands for. Resampling does the same
within a level: a few vectors of each cluster, the ones nearest to its centre, are clustered again, and centres move to
where there were few.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.curation.block_workers import BlockWorkers
from orchestrator.data.curation.kmeans import Clusters, assign, fit
from orchestrator.data.curation.sampling import fill
from orchestrator.data.curation.vectors import ArrayVectors, SomeVectors, Vectors
from orchestrator.data.rng import derive, generator

logger = logging.getLogger("orchestrator")

Ints = NDArray[np.int64]

# Where a fit takes no time, several first centres are tried.
_SMALL = 1 << 18
_STARTS = 4


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of vectors, clusters of these clusters' centres, and so on.

    Attributes:
        labels: of each level, finest first: the cluster of each vector, and above that of each cluster of the level
            below. Each level is numbered from the cluster of most vectors down, and none is empty.
        distances_N: of each vector to the centre of its finest cluster, not squared.
        inertias: of each level, the sum of squared distances of what it clusters.
    """

    labels: tuple[Ints, ...]
    distances_N: NDArray[np.float64]
    inertias: tuple[float, ...]

    def of_vectors(self) -> Ints:
        """(N, levels): the cluster of each vector at each level, finest first."""
        found = [self.labels[0]]
        for above in self.labels[1:]:
            found.append(above[found[-1]])
        return np.stack(found, axis=1)


def cluster_levels(
    vectors: Vectors,
    num_clusters: Sequence[int],
    seed: int,
    *,
    resampling: int = 0,
    workers: BlockWorkers | None = None,
    work: Path | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Hierarchy:
    """Cluster vectors, and the centres of each level again.

    Args:
        vectors: N of them, finite.
        num_clusters: of each level, finest first, each at most the one before.
        seed: of all draws.
        resampling: how many times each level is clustered again from the vectors that are nearest to its centres: of
            each cluster, half as many as a cluster has on average, and at least two.
        workers: see :func:`fit`; only the finest level goes to them.
        work: a folder, see :func:`fit`.
        stop: see :func:`fit`.

    Raises:
        ValueError: see :func:`fit`.
    """
    found: list[Clusters] = []
    at: Vectors = vectors
    for level, wanted in enumerate(num_clusters):
        level_workers = workers if level == 0 else None
        here = work / f"level-{level}" if work is not None else None
        count = min(wanted, at.shape[0])
        clusters = _fit(at, count, derive(seed, "level", level), level_workers, here, stop)
        for number in range(resampling):
            rows = typical_rows(clusters, max(2, -(-at.shape[0] // (2 * count))))
            some = SomeVectors(at, rows)
            again = here / f"again-{number}" if here is not None else None
            fitted = _fit(
                some, min(count, len(rows)), derive(seed, "level", level, number), level_workers, again, stop
            )
            stop()
            clusters = assign(at, fitted.centres_KD, level_workers)
        clusters = _without_empty(clusters)
        logger.debug("level %d: %d clusters, inertia %.6g", level, len(clusters.centres_KD), clusters.inertia)
        found.append(clusters)
        at = ArrayVectors(clusters.centres_KD)
    distances_N = np.sqrt(found[0].distances_N, dtype=np.float64)
    return Hierarchy(_numbered(found), distances_N, tuple(clusters.inertia for clusters in found))


def typical_rows(clusters: Clusters, each: int) -> Ints:
    """The rows nearest to each centre, at most `each` of a cluster, ascending."""
    order_N = np.lexsort((clusters.distances_N, clusters.labels_N))
    firsts_K = np.cumsum(clusters.sizes) - clusters.sizes
    rank_N = np.arange(len(order_N)) - firsts_K[clusters.labels_N[order_N]]
    return np.sort(order_N[rank_N < each])


def draw(hierarchy: Hierarchy, target: int, seed: int) -> NDArray[np.bool_]:
    """Which vectors a balanced sample of `target` takes.

    It is shared evenly among the clusters of the coarsest level, each one's share evenly among the clusters in it, and
    so on, as far as there are enough; within a finest cluster vectors are drawn at random.
    """
    rng = generator(seed, "balance")
    labels = hierarchy.labels
    sizes = [np.bincount(labels[0])]
    for above in labels[1:]:
        sizes.append(np.bincount(above, sizes[-1]).astype(np.int64))
    counts = fill(sizes[-1].tolist(), target, rng)
    for level in range(len(labels) - 1, 0, -1):
        below = np.zeros_like(sizes[level - 1])
        for members, count in zip(_members(labels[level]), counts, strict=True):
            below[members] = fill(sizes[level - 1][members].tolist(), int(count), rng)
        counts = below
    chosen = np.zeros(len(labels[0]), dtype=np.bool_)
    for members, count in zip(_members(labels[0]), counts, strict=True):
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def _fit(
    vectors: Vectors,
    count: int,
    seed: int,
    workers: BlockWorkers | None,
    work: Path | None,
    stop: Callable[[], None],
) -> Clusters:
    if vectors.shape[0] * count <= _SMALL:
        return fit(vectors, count, seed, starts=_STARTS, workers=workers, stop=stop)
    return fit(vectors, count, seed, workers=workers, work=work, stop=stop)


def _without_empty(clusters: Clusters) -> Clusters:
    """Clusters without those that have nothing, which would count as much as others one level up."""
    full_K = clusters.sizes > 0
    labels_N = (np.cumsum(full_K) - 1)[clusters.labels_N].astype(np.int32)
    return Clusters(clusters.centres_KD[full_K], labels_N, clusters.distances_N, clusters.inertia)


def _numbered(found: Sequence[Clusters]) -> tuple[Ints, ...]:
    """The labels of each level, with clusters numbered by how many vectors they have, most first."""
    labels = [clusters.labels_N.astype(np.int64) for clusters in found]
    sizes = np.ones(len(labels[0]), np.int64)
    for level, own in enumerate(labels):
        sizes = np.bincount(own, sizes).astype(np.int64)
        order_K = np.argsort(-sizes, kind="stable")
        rank_K = np.empty_like(order_K)
        rank_K[order_K] = np.arange(len(order_K))
        labels[level] = rank_K[own]
        sizes = sizes[order_K]
        if level + 1 < len(labels):
            labels[level + 1] = labels[level + 1][order_K]
    return tuple(labels)


def _members(labels: Ints) -> list[Ints]:
    """What is in each cluster, ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])
