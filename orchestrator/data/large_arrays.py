"""Arrays with a row for each picture: in memory while they are small, else in a file of this machine's cache.

The system takes the pages of such a file out of memory when it needs them, so that what a process must have in memory
does not grow with the number of pictures. The file has no name: it goes with the array, however the process ends.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from orchestrator.disk import LEFT_FREE, space
from orchestrator.fsio import why
from orchestrator.storage.cache_folder import cache_folder

logger = logging.getLogger("orchestrator")

# Bytes up to which an array is in memory.
_SMALL = 32 * 2**20
# Bytes of the rows that are worked on at a time.
_PIECE = 8 * 2**20


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array to fill. One for which the disk has no room is in memory, too, and a warning says so once."""
    size = prod(shape) * np.dtype(dtype).itemsize
    if size <= _SMALL:
        return np.empty(shape, dtype)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free, total = space(folder)
        if size <= free - LEFT_FREE * total:
            with tempfile.TemporaryFile(dir=folder) as file:
                # Without it a full disk would end the process at some later write.
                os.posix_fallocate(file.fileno(), 0, size)
                # The mapping keeps the file when it is closed.
                return np.asarray(np.memmap(file, dtype=dtype, mode="r+", shape=shape))
        _warn(f"the disk of {folder} would have less than {LEFT_FREE:.0%} free")
    except OSError as error:
        _warn(f"{folder} cannot be used: {why(error)}")
    return np.empty(shape, dtype)


def pieces(rows: NDArray[Any]) -> Iterator[slice]:
    """Slices of the first axis, in order, each of a few megabytes and at least one row."""
    step = max(1, _PIECE * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def stacked(parts: Iterable[NDArray[Any]], num_rows: int) -> NDArray[Any]:
    """What `np.concatenate` gives of the parts, which have `num_rows` rows together and are taken one at a time.

    Raises:
        ValueError: there are no parts, or they have another number of rows.
    """
    found: NDArray[Any] | None = None
    at = 0
    for part in parts:
        if found is None:
            found = empty((num_rows, *part.shape[1:]), part.dtype)
        found[at : at + len(part)] = part
        at += len(part)
    if found is None or at != num_rows:
        raise ValueError(f"the parts have {at} rows, not {num_rows}")
    return found


def taken(array: NDArray[Any], rows: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """`array[rows]`, a few megabytes at a time."""
    found = empty((len(rows), *array.shape[1:]), array.dtype)
    for piece in pieces(found):
        found[piece] = array[rows[piece]]
    return found


@cache
def _warn(reason: str) -> None:
    logger.warning("large features are kept in memory, and not in files: %s", reason)
