"""Pictures in Parquet files, as data sets on hubs are: a column of image bytes, or of bytes with a path.

Parquet compresses and packs values, so the smallest piece that can be read is one column of one row group. The last
few are kept in memory, up to a bound. Files whose row groups have at most some hundred pictures are read well in any
order; of larger ones each picture costs its whole group.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.data.sources.captions import text_of
from orchestrator.data.sources.remote import is_remote, open_object
from orchestrator.errors import first_line
from orchestrator.fsio import NotAFileError, open_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ENDINGS = frozenset({".parquet"})
# Columns of bytes, of names, of captions and of labels by what they are called, likeliest first.
_IMAGES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
    "bytes",
    "content",
    "picture",
    "photo",
)
_NAMES = ("path", "file_name", "filename", "file", "key", "__key__", "id")
_CAPTIONS = ("caption", "text", "captions", "txt")
_LABELS = ("label", "cls", "class", "labels")
# Bytes of row groups that a process keeps.
_KEPT_BYTES = 256 << 20
# Bytes that one request to a bucket asks for, unless it needs more.
_BLOCK = 1 << 20

Row = tuple[str, int, int, str | None, str | None]


class NoPicturesError(ValueError):
    """A table without pictures."""


class DamagedRowsError(ValueError):
    """A file whose foot can be read, and whose rows cannot; `pictures` is the number of these."""

    def __init__(self, what: str, pictures: int) -> None:
        super().__init__(what)
        self.pictures = pictures


def rows(path: Path) -> list[Row]:
    """The pictures of a file: name, row group, row in it, caption and label of each. No image bytes are read.

    Raises:
        NoPicturesError: no column has image bytes.
        DamagedRowsError: its rows cannot be read.
        ValueError: the file is not a Parquet file.
        OSError: it cannot be read.
    """
    import pyarrow as pa

    found: list[Row] = []
    total = 0
    try:
        with _opened(path) as file:
            schema = file.schema_arrow
            column = _image_column(schema)
            total = file.metadata.num_rows
            names = _names(schema, column)
            caption, label = _text(schema, _CAPTIONS), _text(schema, _LABELS)
            classes = _classes(schema, label)
            wanted = [name for name in (names, caption, label) if name is not None]
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                cells = file.read_row_group(group, columns=wanted).to_pydict() if wanted else {}
                if names is not None and "." in names:
                    top, _, inner = names.partition(".")
                    cells[names] = [(cell or {}).get(inner) for cell in cells.get(top, [None] * count)]
                for row in range(count):
                    name = _plain(cells[names][row]) if names is not None else None
                    known = _text_in(cells[label][row], classes) if label is not None else None
                    text = _text_in(cells[caption][row], ()) if caption is not None else None
                    found.append((name or f"row {len(found)}", group, row, text, known))
    except (pa.ArrowException, KeyError, OSError) as error:
        if total:
            raise DamagedRowsError(first_line(error), total) from error
        if isinstance(error, OSError):
            raise
        raise ValueError(first_line(error)) from error
    return found


def picture(path: Path | str, group: int, row: int) -> bytes:
    """The bytes of one picture.

    Raises:
        NotAFileError: the file has no such row, or no bytes there.
        OSError: it cannot be read.
    """
    import pyarrow as pa

    try:
        column = _groups.column(Path(path), group)
        value = column[row].as_py() if row < len(column) else None
    except (pa.ArrowException, ValueError, IndexError) as error:
        raise NotAFileError(0, first_line(error), str(path)) from error
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise NotAFileError(0, "the row has no image bytes", str(path))
    return data


class _Groups:
    """The image columns of row groups that were used last, of this process."""

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._kept: OrderedDict[tuple[str, tuple[int, ...], int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def column(self, path: Path, group: int) -> pa.ChunkedArray:
        look: tuple[int, ...] = ()
        if not is_remote(path):
            status = path.stat()
            look = status.st_size, status.st_mtime_ns
        key = (str(path), look, group)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with _opened(path) as file:
            if group >= file.num_row_groups:
                raise ValueError("the file has no such row group")
            column = file.read_row_group(group, columns=[_image_column(file.schema_arrow)]).column(0)
        with self._lock:
            if key not in self._kept:
                self._kept[key], self._used = column, self._used + column.nbytes
            while self._used > self._most and len(self._kept) > 1:
                self._used -= self._kept.popitem(last=False)[1].nbytes
        return column


_groups = _Groups(_KEPT_BYTES)


def _opened(path: Path) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    source: Any = open_object(path, block=_BLOCK)[0] if is_remote(path) else open_regular(path)
    try:
        return pq.ParquetFile(source, pre_buffer=False)
    except BaseException:
        source.close()
        raise


def _image_column(schema: pa.Schema) -> str:
    import pyarrow as pa

    def has_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(
                kind.field(at).name == "bytes" and has_bytes(kind.field(at).type)
                for at in range(kind.num_fields)
            )
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    there = [name for name in schema.names if has_bytes(schema.field(name).type)]
    known = [name for name in _IMAGES if name in there]
    if not known and len(there) != 1:
        raise NoPicturesError(f"no column of image bytes; its columns are {', '.join(schema.names)[:200]}")
    return (known or there)[0]


def _names(schema: pa.Schema, column: str) -> str | None:
    import pyarrow as pa

    kind = schema.field(column).type
    if pa.types.is_struct(kind) and any(kind.field(at).name == "path" for at in range(kind.num_fields)):
        return f"{column}.path"
    return next((name for name in _NAMES if name in schema.names), None)


def _plain(name: object) -> str:
    """A picture's name in a file, for its path; empty where it is none: what leads elsewhere, or no terminal takes."""
    text = str(name) if isinstance(name, (str, int)) else ""
    return text if text.isprintable() and not text.startswith("/") and ".." not in text.split("/") else ""


def _text(schema: pa.Schema, names: tuple[str, ...]) -> str | None:
    """The first column of texts, of lists of texts, or of numbers among `names`."""
    from pyarrow import types

    told = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    for name in names:
        if name not in schema.names:
            continue
        kind = schema.field(name).type
        if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
            kind = kind.value_type
        if any(is_one(kind) for is_one in told):
            return name
    return None


def _classes(schema: pa.Schema, label: str | None) -> tuple[str, ...]:
    """The names of numbered classes, where the file says them as the `datasets` package does."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(map(str, told["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _text_in(value: Any, classes: tuple[str, ...]) -> str | None:
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return text_of(value)
