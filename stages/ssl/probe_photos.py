"""The photos that k-NN is watched on during training, and what it is: an accuracy that no number of workers changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.blocks import Block
from orchestrator.data.curation.components import HELD_OUT
from orchestrator.data.decode import UnreadableImage, read_square
from orchestrator.data.index import ImageIndex
from orchestrator.data.rng import derive
from orchestrator.data.sources.folder import shown
from orchestrator.evaluation.metrics.knn import knn_leave_one_out
from orchestrator.stages.ssl.knn import KnnProbe

KNN, SAME_PHOTO = "knn", "same_photo"
# Photos of a block: a fixed number, so that a forward pass is the same one whoever computes it.
_BLOCK = 16
# Fewer held-out photos would say too little.
_FEW = 50
# Of the side of the square that two parts of a photo are cut from: they share a quarter of their pixels.
_PART = 2 / 3
_THREADS = 4


class ProbePhotos:
    """Blocks of photos as evaluation sees them; a :class:`~orchestrator.data.blocks.BlockSource` of one step.

    Arrays of a block of S photos: "photos" (S, V, C, side, side) uint8 or uint16, of one centred square each, or of two
    of its corners where there are no labels; "labels" (S,) int64, -1 for a photo that cannot be read; "places" (S,)
    int64, where they are among all of them; and "count" (1,) int64, how many these are.

    Args:
        index: the photographs.
        most: photos, at most.
        size: pixels a side of what the backbone sees.
    """

    def __init__(self, index: ImageIndex, most: int, size: int) -> None:
        self._index, self._size = index, size
        self.rows, labels = probe_rows(index, most)
        self.num_views = 1 if labels else 2
        names = labels or [str(row) for row in self.rows]
        self._labels = np.unique(names, return_inverse=True)[1].astype(np.int64)
        self.num_blocks = -(-len(self.rows) // _BLOCK)
        self._troubles: list[str] = []

    @classmethod
    def of(
        cls, index_folder: Path, probe: KnnProbe, size: int, roots: Mapping[str, str] | None = None
    ) -> ProbePhotos:
        """Those of a curated index; see :meth:`ImageIndex.load` for `roots`."""
        return cls(ImageIndex.load(index_folder, roots), probe.photos, size)

    def load(self, step: int, index: int) -> Block:
        """The block `index`, the same one in each step."""
        places = np.arange(index * _BLOCK, min((index + 1) * _BLOCK, len(self.rows)), dtype=np.int64)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="knn") as pool:
            views = list(pool.map(self._views, [self.rows[place] for place in places]))
        readable = np.array([one is not None for one in views])
        deep = np.uint16 if self._index.is_deep else np.uint8
        blank = np.zeros((self.num_views, self._index.num_channels, self._size, self._size), deep)
        arrays: dict[str, NDArray[Any]] = {
            "photos": np.stack([blank if one is None else one for one in views]),
            "labels": np.where(readable, self._labels[places], -1),
            "places": places,
            "count": np.array([len(self.rows)], np.int64),
        }
        return Block(step, index, np.array(self.rows, np.int64)[places], arrays)

    def pop_troubles(self) -> list[str]:
        """See :class:`~orchestrator.data.blocks.ReportsTroubles`."""
        taken, self._troubles = self._troubles, []
        return taken

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See :class:`~orchestrator.data.blocks.ReportsTroubles`."""
        return [shown(str(self._index.path(row))) for row in rows]

    def _views(self, row: int) -> NDArray[np.integer[Any]] | None:
        side = self._size if self.num_views == 1 else round(self._size / _PART)
        try:
            limit, pixels = self._index[row].max_pixels, self._index.pixels(row)
            square = read_square(self._index.path(row), side, limit, pixels=pixels)
        except UnreadableImage as error:
            path = shown(str(error.path))
            self._troubles.append(f"a photo of the k-NN evaluation cannot be read: {path}: {error.reason}")
            return None
        parts = [square[: self._size, : self._size]]
        if self.num_views == 2:
            parts.append(square[-self._size :, -self._size :])
        return np.ascontiguousarray(np.stack(parts).transpose(0, 3, 1, 2))


def probe_rows(index: ImageIndex, most: int) -> tuple[list[int], list[str]]:
    """Which photos are watched, ascending, and their labels; no labels if there are not two that two photos share.

    They are drawn by the content of the files, so that the same photos are watched wherever they are in the index.
    """
    keys = [derive(KNN, one.sha256, one.path) for one in index]
    drawn = sorted(range(len(index)), key=keys.__getitem__)
    of_those = frozenset(index.rows_of(HELD_OUT).tolist())
    held_out = [row for row in drawn if row in of_those]
    labels = index.labels
    for candidates in (held_out, drawn):
        rows = _sharing(_sharing(candidates, labels)[:most], labels)
        if len(rows) >= (_FEW if candidates is held_out else 1) and len({labels[row] for row in rows}) > 1:
            return sorted(rows), [str(labels[row]) for row in sorted(rows)]
    return sorted((held_out if len(held_out) >= _FEW else drawn)[:most]), []


def _sharing(rows: Sequence[int], labels: Sequence[str | None]) -> list[int]:
    """Those with a label that another one of them has, too: the others can only be missed."""
    counts = Counter(labels[row] for row in rows)
    return [row for row in rows if labels[row] and counts[labels[row]] > 1]


def accuracy(features_NVD: NDArray[np.floating], labels_N: NDArray[np.int64], k: int) -> dict[str, float]:
    """The figure, by its name: `knn` of photos with labels, or `same_photo` of two parts of each.

    Args:
        features_NVD: of the photos; of one or two views.
        labels_N: -1 leaves a photo out.
        k: neighbours; 1 where there are two views.

    Returns:
        From 0 to 1. 0 of features that are not finite, and of less than two photos.
    """
    views = features_NVD.shape[1]
    name = KNN if views == 1 else SAME_PHOTO
    kept_NVD, kept_N = features_NVD[labels_N >= 0], labels_N[labels_N >= 0]
    if len(kept_N) < 2 or not np.isfinite(kept_NVD).all():
        return {name: 0.0}
    names = [str(label) for label in np.repeat(kept_N, views)]
    return {name: knn_leave_one_out(kept_NVD.reshape(len(names), -1), names, k if views == 1 else 1)}
