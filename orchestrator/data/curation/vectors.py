"""Where the vectors lie that are clustered: in memory, or in a `.npy` file that is read piece by piece.

A file is read, not mapped: mapped pages count as the memory of every process that touches them, and what is to be
clustered may be larger than all memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from orchestrator.errors import UserError, first_line
from orchestrator.fsio import open_regular

Floats = NDArray[np.float32]

_TYPES = (np.dtype("<f2"), np.dtype("<f4"), np.dtype("<f8"))


class Vectors(Protocol):
    """N vectors of D numbers, readable in pieces by any process that they are sent to."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and D."""

    def read(self, start: int, stop: int) -> Floats:
        """Rows `start` to `stop`, (stop - start, D) float32; not to be written to."""

    def take(self, rows_n: NDArray[np.int64]) -> Floats:
        """Any rows, in the order given, (n, D) float32; a copy."""


@dataclass(frozen=True)
class ArrayVectors:
    """Vectors in memory, (N, D)."""

    array_ND: Floats

    @property
    def shape(self) -> tuple[int, int]:
        return self.array_ND.shape[0], self.array_ND.shape[1]

    def read(self, start: int, stop: int) -> Floats:
        return np.asarray(self.array_ND[start:stop], dtype=np.float32)

    def take(self, rows_n: NDArray[np.int64]) -> Floats:
        return np.asarray(self.array_ND[rows_n], dtype=np.float32)


@dataclass(frozen=True)
class SomeVectors:
    """Some rows of other vectors, read from there."""

    vectors: Vectors
    rows_N: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows_N), self.vectors.shape[1]

    def read(self, start: int, stop: int) -> Floats:
        return self.vectors.take(self.rows_N[start:stop])

    def take(self, rows_n: NDArray[np.int64]) -> Floats:
        return self.vectors.take(self.rows_N[rows_n])


@dataclass(frozen=True)
class FileVectors:
    """Vectors in a `.npy` file; made by :func:`open_vectors`.

    Attributes:
        path: of the file, which every process that reads must have.
        offset: bytes before the first vector.
        shape: N and D.
        dtype: of the numbers in the file.
    """

    path: Path
    offset: int
    shape: tuple[int, int]
    dtype: str

    def read(self, start: int, stop: int) -> Floats:
        return self._pieces([(start, stop)], stop - start)

    def take(self, rows_n: NDArray[np.int64]) -> Floats:
        breaks = np.flatnonzero(np.diff(rows_n) != 1) + 1
        runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows_n, breaks) if len(run)]
        return self._pieces(runs, len(rows_n))

    def _pieces(self, runs: Sequence[tuple[int, int]], total: int) -> Floats:
        dtype = np.dtype(self.dtype)
        found = np.empty((total, self.shape[1]), dtype)
        width = dtype.itemsize * self.shape[1]
        place = 0
        with open_regular(self.path) as file:
            for start, stop in runs:
                target = found[place : place + stop - start].reshape(-1).view(np.uint8).data
                done = 0
                while done < len(target):
                    count = os.preadv(file.fileno(), [target[done:]], self.offset + start * width + done)
                    if not count:
                        raise _damaged(self.path, "it is shorter than its head says")
                    done += count
                place += stop - start
        return found.astype(np.float32, copy=False)


def open_vectors(path: Path) -> FileVectors:
    """The vectors of a `.npy` file of two axes of floating-point numbers, as `numpy.save` writes it.

    Raises:
        UserError: it is not there, is another sort of file, or is shorter than it says.
    """
    try:
        with open_regular(path) as file:
            version = npy.read_magic(file)
            read_head = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_columns, dtype = read_head(file)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise _damaged(path, first_line(error)) from error
    if len(shape) != 2 or by_columns or dtype not in _TYPES:
        raise _damaged(path, f"it has numbers of type {dtype} with {len(shape)} axes")
    if offset + shape[0] * shape[1] * dtype.itemsize > size:
        raise _damaged(path, "it is shorter than its head says")
    return FileVectors(path.resolve(), offset, (shape[0], shape[1]), dtype.str)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"no vectors can be read from this file: {why}",
        where=str(path),
        hint="write it with numpy.save: one row per picture, float16, float32 or float64",
    )
