"""The columns of a photo index in Arrow, mapped from a file: all processes of a machine share one copy of them.

Parquet is packed and cannot be mapped. So the first process that opens a large index writes it in Arrow's own format
into the cache folder, and every one maps that. Without a cache that can be written, each process holds the columns.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from orchestrator.fsio import replacing
from orchestrator.storage.cache_folder import cache_folder

logger = logging.getLogger("orchestrator")

FOLDER = "indexes"
# Raised when columns are written in another way.
_FORMAT = 1
_CHUNK_ROWS = 1 << 16
# An index of fewer pictures takes no memory worth sharing.
MAPPED_FROM = 10_000
# What nobody opened for so long goes.
_UNUSED_S = 30 * 86400.0
_DIGEST_BYTES = 32
# Texts of which few are different.
_CODED = ("source", "root", "component", "label")
# Columns that are left out where no picture has a value.
_SPARSE = ("caption", "label", "duplicate_of", "captions")


def compact(table: pa.Table) -> pa.Table:
    """The columns in the fewest bytes: a code for each text of which few are different, 32 bytes for a sha256."""
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if name == "id" or (name in _SPARSE and column.null_count == len(column)):
            continue
        if name in _CODED:
            column = _coded(column)
        elif name == "sha256":
            column = _as_bytes(column)
        columns[name] = column
    return pa.table(columns)


def _coded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = column.unique().drop_null()
    kind = next(
        kind for kind in (pa.int8(), pa.int16(), pa.int32()) if len(values) < 1 << (kind.bit_width - 1)
    )
    chunks = [
        pa.DictionaryArray.from_arrays(pc.index_in(chunk, value_set=values).cast(kind), values)
        for chunk in column.chunks
    ]
    return pa.chunked_array(chunks, type=pa.dictionary(kind, pa.string()))


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Digests as bytes; texts stay where one is no sha256."""
    chunks = []
    for start in range(0, len(column), _CHUNK_ROWS):
        texts = column.slice(start, _CHUNK_ROWS).to_pylist()
        if any(len(text) != 2 * _DIGEST_BYTES for text in texts):
            return column
        try:
            chunks.append(pa.array([bytes.fromhex(text) for text in texts], pa.binary(_DIGEST_BYTES)))
        except ValueError:
            return column
        if any(text != text.lower() for text in texts):
            return column
    return pa.chunked_array(chunks, type=pa.binary(_DIGEST_BYTES))


def plain(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """A column as it is in the index file."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), kind)])
    column = table.column(name)
    if pa.types.is_dictionary(column.type):
        return pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], type=kind)
    if pa.types.is_fixed_size_binary(column.type):
        texts = [[one.hex() for one in chunk.to_pylist()] for chunk in column.chunks]
        return pa.chunked_array([pa.array(some, kind) for some in texts], type=kind)
    return column


def values(table: pa.Table, name: str) -> list[str]:
    """The different texts of a coded column, sorted."""
    column = table.column(name)
    return sorted(column.chunk(0).dictionary.to_pylist()) if column.num_chunks else []


def rows_with(table: pa.Table, name: str, value: str) -> NDArray[np.int64]:
    """The rows whose coded column has this text, ascending."""
    found = [np.empty(0, np.int64)]
    start = 0
    for chunk in table.column(name).chunks:
        known = chunk.dictionary.to_pylist()
        if value in known:
            codes = chunk.indices.to_numpy(zero_copy_only=False)
            found.append(np.flatnonzero(codes == known.index(value)) + start)
        start += len(chunk)
    return np.concatenate(found).astype(np.int64)


def numbers(table: pa.Table, name: str) -> Iterator[NDArray[np.generic]]:
    """The numbers of a column without nulls, piece by piece."""
    for chunk in table.column(name).chunks:
        yield chunk.to_numpy(zero_copy_only=False)


def mapped_file(index: Path) -> Path:
    """Where the columns of an index file are in the cache: another file, or a changed one, has another place."""
    status = index.stat()
    named = f"{_FORMAT} {index.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    return cache_folder() / FOLDER / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.arrow"


def open_mapped(path: Path) -> pa.Table | None:
    """The columns in a file of :func:`write_mapped`; None if there is none that can be read."""
    try:
        os.utime(path)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        logger.debug("columns of an index are not mapped: %s", error)
        return None


def write_mapped(path: Path, table: pa.Table) -> pa.Table:
    """Write columns, and map them; the same columns where that cannot be done, or is not worth it."""
    if len(table) < MAPPED_FROM:
        return table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.iterdir():
            # What another process writes at the same time may get its name meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - other.stat().st_mtime > _UNUSED_S:
                    other.unlink()
        with (
            replacing(path) as draft,
            pa.OSFile(str(draft), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=_CHUNK_ROWS)
    except (pa.ArrowException, OSError) as error:
        logger.debug("columns of an index are not kept: %s", error)
        return table
    return open_mapped(path) or table
