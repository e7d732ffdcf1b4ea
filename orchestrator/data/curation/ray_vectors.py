"""Vectors in the object store of a Ray cluster, for machines that do not see the file that they are in.

Each block is an object of its own: a machine fetches what it reads, and what does not fit into memory lies on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.curation.vectors import FileVectors, Floats, SomeVectors, Vectors

# Bytes of an object, of which a worker has a few in memory at once.
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class RayVectors:
    """Vectors in blocks of `rows` each, the last one of what is left.

    Attributes:
        blocks: references to arrays (rows, D) float32, which the process that put them there owns.
        rows: of a block.
        shape: N and D.
    """

    blocks: tuple[Any, ...]
    rows: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, vectors: Vectors) -> RayVectors:
        """Put vectors into the object store of the cluster that this process is connected to."""
        import ray

        total, dim = vectors.shape
        rows = max(1, _BLOCK_BYTES // (4 * dim))
        blocks = [ray.put(vectors.read(start, min(start + rows, total))) for start in range(0, total, rows)]
        return cls(tuple(blocks), rows, (total, dim))

    def read(self, start: int, stop: int) -> Floats:
        """See :class:`Vectors`."""
        import ray

        first, last = start // self.rows, -(-stop // self.rows)
        parts: Sequence[Floats] = ray.get(list(self.blocks[first:last]))
        offset = first * self.rows
        if len(parts) == 1:
            return parts[0][start - offset : stop - offset]
        found = [
            part[max(0, start - offset - at * self.rows) : stop - offset - at * self.rows]
            for at, part in enumerate(parts)
        ]
        return np.concatenate(found) if found else np.empty((0, self.shape[1]), np.float32)

    def take(self, rows_n: NDArray[np.int64]) -> Floats:
        """See :class:`Vectors`; one block is in memory at a time."""
        import ray

        taken = np.empty((len(rows_n), self.shape[1]), np.float32)
        holders_n = rows_n // self.rows
        for block in np.unique(holders_n).tolist():
            at = np.flatnonzero(holders_n == block)
            taken[at] = ray.get(self.blocks[block])[rows_n[at] - block * self.rows]
        return taken


def in_object_store(vectors: Vectors, known: dict[FileVectors, RayVectors]) -> Vectors:
    """Vectors that every machine of the cluster can read.

    Args:
        vectors: those in a file go into the object store; those in memory are sent as they are.
        known: the files that are there already; a file that is clustered several times is sent once.
    """
    if isinstance(vectors, SomeVectors):
        return SomeVectors(in_object_store(vectors.vectors, known), vectors.rows_N)
    if not isinstance(vectors, FileVectors):
        return vectors
    if vectors not in known:
        known[vectors] = RayVectors.of(vectors)
    return known[vectors]
