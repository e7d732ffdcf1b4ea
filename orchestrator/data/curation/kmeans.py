"""k-means over any number of vectors, in memory or in a file, by any number of workers, with one result.

Lloyd's algorithm in passes over fixed blocks of rows. Three things make it fast and exact:

- Distances are matrix products of tiles: at no time are there N×K of them.
- Between passes over all centres, a row is compared only with the centres around its present one (Agustsson et al.
  2017, "k²-means for fast and accurate large scale clustering"). Rows whose centres lie near each other are taken
  together, so this is a matrix product, too. Such a pass never makes a row worse, and the last pass compares every row
  with every centre: what comes out is an assignment to the nearest centres.
- Sums are exact. Vectors are rounded to a grid on which sums of all of them fit into a float64 without rounding, so the
  order of additions, and with it the number of workers and which of them was lost, does not matter. For the same reason
  a pass adds and subtracts only the rows that moved.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.curation.block_workers import BlockWorkers, ThreadWorkers
from orchestrator.data.curation.kmeans_start import spread_start
from orchestrator.data.curation.nearest import Around, nearest, with_norms
from orchestrator.data.curation.vectors import Floats, Vectors
from orchestrator.data.rng import derive
from orchestrator.fsio import replacing

logger = logging.getLogger("orchestrator")

Ints = NDArray[np.int32]
Doubles = NDArray[np.float64]

# Bytes of a block's vectors, which are in memory at once with a few copies.
_BLOCK_BYTES = 8 << 20
_SUM_ROWS = 2048
# Pieces of a pass for each worker, so that a slow one does not keep the others waiting.
_PIECES = 4
# Rows of a piece that may become the centres of clusters that lost all rows.
_FAR = 64
_GRID_BITS = 30
# What float32 makes of an inertia, relative to it.
_ROUNDING = 1e-6
# Of the state that a fit keeps.
_FORMAT = 1


@dataclass(frozen=True)
class Clusters:
    """What :func:`fit` found.

    Attributes:
        centres_KD: the mean of each cluster's vectors.
        labels_N: the nearest centre of each row.
        distances_N: squared Euclidean distance to it.
        inertia: their sum.
        history: the inertia of each pass, over all starts the chosen one's.
    """

    centres_KD: Floats
    labels_N: Ints
    distances_N: Floats
    inertia: float
    history: tuple[float, ...] = ()

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each cluster. One is empty only if there are fewer different vectors than clusters."""
        return np.bincount(self.labels_N, minlength=len(self.centres_KD)).astype(np.int64)


@dataclass(frozen=True)
class _Frame:
    """In which numbers are added: relative to `shift_D`, in units of 1 / `scale`."""

    shift_D: Floats
    scale: float
    block_rows: int


@dataclass(frozen=True)
class _Pass:
    """What all pieces of a pass share. Without `around`, rows are compared with all centres."""

    frame: _Frame
    centres_KE: Floats
    around: Around | None
    sums: bool


@dataclass(frozen=True)
class _Piece:
    """Consecutive blocks of rows, and the clusters that they were in."""

    start: int
    stop: int
    labels_n: Ints | None = None


@dataclass
class _Found:
    """What a pass found for one piece; of all pieces together after :meth:`_Model._pass`.

    Attributes:
        start: the first row.
        labels_n, distances_n: of its rows.
        inertias: of each block, with its first row.
        sums_KD, counts_K: what the clusters of the pass before have to be given; all, where there was none.
        far: the rows that are farthest from their centres, with their distances.
    """

    start: int
    labels_n: Ints
    distances_n: Floats
    inertias: list[tuple[int, float]]
    sums_KD: Doubles | None
    counts_K: NDArray[np.int64]
    far: list[tuple[float, int]]

    @classmethod
    def nothing(cls, start: int, total: int, shared: _Pass, with_sums: bool) -> _Found:
        """Of a piece of `total` rows, before any was looked at."""
        num_clusters, width = shared.centres_KE.shape
        return cls(
            start,
            np.empty(total, np.int32),
            np.empty(total, np.float32),
            [],
            np.zeros((num_clusters, width - 1)) if with_sums else None,
            np.zeros(num_clusters, np.int64),
            [],
        )

    @property
    def inertia(self) -> float:
        return math.fsum(value for _, value in sorted(self.inertias))


def fit(
    vectors: Vectors,
    num_clusters: int,
    seed: int,
    *,
    iterations: int = 25,
    tolerance: float = 1e-4,
    starts: int = 1,
    workers: BlockWorkers | None = None,
    work: Path | None = None,
    stop: Callable[[], None] = lambda: None,
) -> Clusters:
    """Clusters of low inertia. The result depends on the vectors, the number of clusters and the seed alone.

    Args:
        vectors: N of them, finite.
        num_clusters: K, at most N.
        seed: of the first centres.
        iterations: the maximum number of passes in which centres move.
        tolerance: the relative gain in inertia of a pass below which the centres stay.
        starts: first centres that are tried; the clusters of the lowest inertia are returned.
        workers: default: the processors of this process.
        work: a folder that keeps the state after each pass; a run that was cut off goes on from there, with the same
            result.
        stop: called before each pass; raises to stop.

    Returns:
        Clusters, in no particular order.

    Raises:
        ValueError: more clusters than vectors, or a number that is not finite.
    """
    total = vectors.shape[0]
    if not 1 <= num_clusters <= total:
        raise ValueError(f"{num_clusters} clusters cannot be made of {total} vectors")
    model = _Model(vectors, workers or ThreadWorkers(), stop)
    best: Clusters | None = None
    for number in range(starts):
        identity = (*model.identity(), num_clusters, seed, iterations, tolerance, number)
        state = _State(work and work / f"kmeans-{number}.npz", identity)
        found = model.fit(num_clusters, derive(seed, "k-means", number), iterations, tolerance, state)
        best = found if best is None or found.inertia < best.inertia else best
    assert best is not None
    return best


def assign(vectors: Vectors, centres_KD: Floats, workers: BlockWorkers | None = None) -> Clusters:
    """The nearest of given centres for every vector.

    Raises:
        ValueError: a number that is not finite.
    """
    model = _Model(vectors, workers or ThreadWorkers(), lambda: None)
    return model.assign(centres_KD)


class _Model:
    """Passes over vectors."""

    def __init__(self, vectors: Vectors, workers: BlockWorkers, stop: Callable[[], None]) -> None:
        self._vectors, self._workers, self._stop = vectors, workers, stop
        self._held = workers.share(vectors)
        self._frame = self._survey()

    def fit(self, num_clusters: int, seed: int, iterations: int, tolerance: float, state: _State) -> Clusters:
        saved = state.load()
        if saved is None:
            first_KD = spread_start(self._vectors, self._frame.shift_D, num_clusters, seed)
            saved = _FitState(first_KD, None, (), None)
        centres_KD, labels_N, history = saved.centres_KD, saved.labels_N, saved.history
        whole, sums = saved.whole, saved.sums
        while True:
            self._stop()
            around = None if whole else Around.of(centres_KD)
            found = self._pass(_Pass(self._frame, with_norms(centres_KD), around, True), labels_N)
            gain = history[-1] - found.inertia if history else math.inf
            settled = gain <= max(tolerance, _ROUNDING) * found.inertia
            history = (*history, found.inertia)
            if around is None and (settled or len(history) > iterations):
                centres_KD = centres_KD + self._frame.shift_D
                return Clusters(centres_KD, found.labels_n, found.distances_n, found.inertia, history)
            labels_N = found.labels_n
            sums = _Sums.after(sums, found)
            centres_KD = self._update(centres_KD, found, sums)
            # The gain of a pass over neighbours alone does not say that nothing is nearer.
            whole = settled or len(history) >= iterations
            state.save(_FitState(centres_KD, labels_N, history, sums, whole))

    def identity(self) -> tuple[Any, ...]:
        """What tells these vectors from others, as far as a look at all of them does."""
        digest = hashlib.sha256(self._frame.shift_D.tobytes()).hexdigest()
        return (*self._vectors.shape, digest, self._frame.scale, self._frame.block_rows)

    def assign(self, centres_KD: Floats) -> Clusters:
        """The clusters of given centres."""
        shifted_KD = (centres_KD - self._frame.shift_D).astype(np.float32)
        found = self._pass(_Pass(self._frame, with_norms(shifted_KD), None, False), None)
        return Clusters(centres_KD, found.labels_n, found.distances_n, found.inertia)

    def _survey(self) -> _Frame:
        """The mean of all vectors, and a grid that sums of them fit on."""
        total, dim = self._vectors.shape
        block_rows = max(1, _BLOCK_BYTES // (4 * dim))
        pieces = [_Piece(start, stop) for start, stop in _spans(total, block_rows)]
        seen: dict[int, tuple[Doubles, Floats, Floats]] = {}
        for start, sums_D, low_D, high_D in self._workers.run(_extent, self._held, None, pieces):
            seen[start] = sums_D, low_D, high_D
        parts = [seen[start] for start in sorted(seen)]
        sums_D = np.sum([sums for sums, _, _ in parts], axis=0)
        low_D = np.min([low for _, low, _ in parts], axis=0)
        high_D = np.max([high for _, _, high in parts], axis=0)
        if not np.isfinite([sums_D, low_D, high_D]).all():
            raise ValueError("the vectors have numbers that are not finite")
        shift_D = (sums_D / total).astype(np.float32)
        most = float(np.max([high_D - shift_D, shift_D - low_D], initial=0.0))
        bits = min(_GRID_BITS, 52 - math.ceil(math.log2(total + 1)))
        return _Frame(shift_D, 2.0 ** (bits - math.ceil(math.log2(most or 1.0))), block_rows)

    def _pass(self, shared: _Pass, labels_N: Ints | None) -> _Found:
        total = self._vectors.shape[0]
        blocks = math.ceil(total / self._frame.block_rows)
        each = max(1, math.ceil(blocks / (_PIECES * self._workers.num_workers))) * self._frame.block_rows
        spans = _spans(total, each)
        pieces = [_Piece(a, b, None if labels_N is None else labels_N[a:b]) for a, b in spans]
        whole = _Found.nothing(0, total, shared, with_sums=False)
        for found in self._workers.run(_assign_piece, self._held, shared, pieces):
            stop = found.start + len(found.labels_n)
            whole.labels_n[found.start : stop] = found.labels_n
            whole.distances_n[found.start : stop] = found.distances_n
            whole.inertias += found.inertias
            whole.counts_K += found.counts_K
            whole.far += found.far
            if whole.sums_KD is None:
                # What Ray hands over cannot be written to.
                whole.sums_KD = None if found.sums_KD is None else found.sums_KD.copy()
            elif found.sums_KD is not None:
                np.add(whole.sums_KD, found.sums_KD, out=whole.sums_KD)
            # What a piece found may be as large as its rows, and the next one's is on its way.
            del found
        return whole

    def _update(self, centres_KD: Floats, found: _Found, sums: _Sums) -> Floats:
        """The means. A cluster without rows is given the row that is farthest from its centre; in place."""
        counts_K = sums.counts_K
        # What a piece offers beyond this depends on how the rows were divided.
        far = iter(sorted(found.far, key=lambda item: (-item[0], item[1]))[:_FAR])
        for empty in np.flatnonzero(counts_K == 0):
            # A cluster of one row would only pass the emptiness on, and a row at its centre would change nothing.
            taken = next((row for away, row in far if away > 0 and counts_K[found.labels_n[row]] > 1), None)
            if taken is None:
                break
            vector_D = _on_grid(self._vectors.take(np.array([taken])) - self._frame.shift_D, self._frame)[0]
            old = found.labels_n[taken]
            sums.sums_KD[old] -= vector_D
            sums.sums_KD[empty] += vector_D
            counts_K[old] -= 1
            counts_K[empty] += 1
            found.labels_n[taken] = empty
        means_KD = sums.sums_KD / (np.maximum(counts_K, 1)[:, None] * self._frame.scale)
        return np.where(counts_K[:, None] > 0, means_KD, centres_KD).astype(np.float32)


def _extent(vectors: Vectors, shared: None, piece: _Piece) -> tuple[int, Doubles, Floats, Floats]:
    rows_nD = vectors.read(piece.start, piece.stop)
    return piece.start, rows_nD.sum(0, dtype=np.float64), rows_nD.min(0), rows_nD.max(0)


def _assign_piece(vectors: Vectors, shared: _Pass, piece: _Piece) -> _Found:
    frame = shared.frame
    width = shared.centres_KE.shape[1]
    found = _Found.nothing(piece.start, piece.stop - piece.start, shared, with_sums=shared.sums)
    for start, stop in _spans(piece.stop - piece.start, frame.block_rows):
        block_nE = np.ones((stop - start, width), np.float32)
        block_nD = block_nE[:, :-1]
        np.subtract(vectors.read(piece.start + start, piece.start + stop), frame.shift_D, out=block_nD)
        if shared.around is None or piece.labels_n is None:
            labels_n, _ = nearest(block_nE, shared.centres_KE)
            distances_n = _distances(block_nD, shared.centres_KE, labels_n)
        else:
            old_n = piece.labels_n[start:stop]
            labels_n, scores_n = shared.around.nearest(block_nE, shared.centres_KE, old_n)
            distances_n = np.maximum(np.einsum("nd,nd->n", block_nD, block_nD) - 2 * scores_n, 0)
        found.labels_n[start:stop], found.distances_n[start:stop] = labels_n, distances_n
        found.inertias.append((piece.start + start, float(distances_n.sum(dtype=np.float64))))
        if found.sums_KD is not None and piece.labels_n is None:
            _add(1, found.sums_KD, found.counts_K, block_nD, labels_n, frame)
        elif found.sums_KD is not None and piece.labels_n is not None:
            old_n = piece.labels_n[start:stop]
            moved_m = np.flatnonzero(labels_n != old_n)
            _add(-1, found.sums_KD, found.counts_K, block_nD[moved_m], old_n[moved_m], frame)
            _add(1, found.sums_KD, found.counts_K, block_nD[moved_m], labels_n[moved_m], frame)
    most = np.argsort(-found.distances_n, kind="stable")[:_FAR] if shared.sums else ()
    found.far = [(float(found.distances_n[row]), piece.start + int(row)) for row in most]
    return found


def _distances(block_nD: Floats, centres_KE: Floats, labels_n: Ints) -> Floats:
    """Squared, from the differences: a difference of squares has no digits left where the distance is small."""
    found = np.empty(len(labels_n), np.float32)
    for start, stop in _spans(len(labels_n), _SUM_ROWS):
        away_nD = block_nD[start:stop] - centres_KE[labels_n[start:stop], :-1]
        found[start:stop] = np.einsum("nd,nd->n", away_nD, away_nD)
    return found


def _add(
    sign: int, sums_KD: Doubles, counts_K: NDArray[np.int64], rows_nD: Floats, labels_n: Ints, frame: _Frame
) -> None:
    """Add each row to its cluster's sum, or take it away."""
    counts_K += sign * np.bincount(labels_n, minlength=len(counts_K))
    for start, stop in _spans(len(rows_nD), _SUM_ROWS):
        order_n = np.argsort(labels_n[start:stop], kind="stable")
        sorted_n = labels_n[start:stop][order_n]
        firsts_m = np.flatnonzero(np.diff(sorted_n, prepend=-1))
        gridded_nD = _on_grid(rows_nD[start:stop][order_n], frame)
        sums_KD[sorted_n[firsts_m]] += sign * np.add.reduceat(gridded_nD, firsts_m, axis=0)


def _on_grid(rows_nD: Floats, frame: _Frame) -> Doubles:
    # A power of two times a float32 is exact; what is left is rounded to whole numbers.
    return np.asarray(np.rint(rows_nD * np.float32(frame.scale)), dtype=np.float64)


def _spans(total: int, each: int) -> list[tuple[int, int]]:
    return [(start, min(start + each, total)) for start in range(0, total, each)]


@dataclass(frozen=True)
class _Sums:
    """Sums of each cluster's vectors on the grid, and how many there are."""

    sums_KD: Doubles
    counts_K: NDArray[np.int64]

    @classmethod
    def after(cls, before: _Sums | None, found: _Found) -> _Sums:
        """With what a pass changed, in place."""
        assert found.sums_KD is not None
        if before is None:
            return cls(found.sums_KD, found.counts_K)
        np.add(before.sums_KD, found.sums_KD, out=before.sums_KD)
        np.add(before.counts_K, found.counts_K, out=before.counts_K)
        return before


@dataclass(frozen=True)
class _FitState:
    """Where a fit stands: the next pass is with these centres, over all of them if `whole`."""

    centres_KD: Floats
    labels_N: Ints | None
    history: tuple[float, ...]
    sums: _Sums | None
    whole: bool = True


class _State:
    """Keeps where a fit stands in a file, if it has one.

    Args:
        path: its folder is made if it is not there.
        identity: of the fit: what another one has saved is not taken.
    """

    def __init__(self, path: Path | None, identity: Sequence[Any]) -> None:
        self._path, self._identity = path, json.dumps([_FORMAT, *identity])
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def load(self) -> _FitState | None:
        """What was saved last; None if there is nothing that can be used."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            with np.load(self._path, allow_pickle=False) as file:
                if str(file["identity"]) != self._identity:
                    return None
                history = tuple(float(value) for value in file["history"])
                sums = _Sums(file["sums"], file["counts"])
                return _FitState(file["centres"], file["labels"], history, sums, bool(file["whole"]))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be read, so clusters are made from the start: %s", self._path, error)
            return None

    def save(self, saved: _FitState) -> None:
        """Keep the state, in place of what was saved before."""
        if self._path is None:
            return
        assert saved.sums is not None
        assert saved.labels_N is not None
        with replacing(self._path, only_writer=True) as draft, draft.open("wb") as file:
            np.savez(
                file,
                identity=np.array(self._identity),
                centres=saved.centres_KD,
                labels=saved.labels_N,
                sums=saved.sums.sums_KD,
                counts=saved.sums.counts_K,
                history=np.array(saved.history),
                whole=np.array(saved.whole),
            )
