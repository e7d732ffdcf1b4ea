"""The table of photographs that training reads: one row a picture, in columns, as `index.parquet`.

In memory it is columns, too, mapped from a file; a row becomes an object only where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import MAX_PIXELS
from orchestrator.data.curation.components import HELD_OUT, LEFT_OUT, RETRIEVED, UNCURATED
from orchestrator.data.index_table import (
    compact,
    mapped_file,
    numbers,
    open_mapped,
    plain,
    rows_with,
    values,
    write_mapped,
)
from orchestrator.errors import UserError, first_line

FILE = "index.parquet"
_BATCH_ROWS = 4096
# In the file's metadata: the datasets' `pixels`, as JSON.
_PIXELS = b"orchestrator.pixels"

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("root", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("label", pa.string()),
        pa.field("component", pa.string(), nullable=False),
        pa.field("cluster", pa.int32(), nullable=False),
        pa.field("duplicate_of", pa.string()),
    ]
)

# Only where some pictures have several.
_CAPTIONS = pa.field("captions", pa.list_(pa.string()))
# Only where some were retrieved.
_RETRIEVED = pa.field("retrieved", pa.bool_(), nullable=False)
# Only where some are not drawn as often as others.
_WEIGHT = pa.field("weight", pa.float64(), nullable=False)


_MORE = (_CAPTIONS, _RETRIEVED, _WEIGHT)


@dataclass(frozen=True)
class ImageRecord:
    """One picture: where it is, what is known of it, and which part of the training mix it belongs to.

    `path` is relative (posix) to the absolute folder `root`; `cluster` is -1 where there was no clustering.
    `captions` are all of a picture that has several, of which `caption` is the first. `weight` says how often it is
    drawn beside others. `retrieved` says that it is near to a seed set: a picture that curation chose may be of the
    component "retrieved", too.
    Training leaves the component "pool" out unless it is told to draw from it, and never draws from "held_out".
    """

    source: str
    path: str
    root: str
    sha256: str
    width: int
    height: int
    caption: str | None = None
    label: str | None = None
    component: str = UNCURATED
    cluster: int = -1
    duplicate_of: str | None = None
    captions: tuple[str, ...] = ()
    weight: float = 1.0
    retrieved: bool = False

    @property
    def max_pixels(self) -> int:
        """The largest width × height at which the file can still be the picture that was indexed."""
        return max(MAX_PIXELS, self.width * self.height)


class ImageIndex:
    """Photographs by row number (the id that sample orders and blocks speak of).

    Pictures are referenced, not copied: `root` is the absolute folder they were in when the index was made, and
    sha256 tells whether a file is still the one that was indexed. Where they are now is for the pipeline file to
    say, see :meth:`load`.
    """

    def __init__(
        self, rows: Sequence[ImageRecord], pixels: Mapping[str, PixelFormat | None] | None = None
    ) -> None:
        columns = {
            field.name: pa.array(_values(rows, field.name), type=field.type)
            for field in (*_SCHEMA, *_MORE)
            if field.name != "id" and (field.name in _SCHEMA.names or _is_told(rows, field.name))
        }
        self._table, self._pixels = compact(pa.table(columns)), dict(pixels or {})
        self._roots: dict[str, str] = {}

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> ImageRecord:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        names = self._table.column_names
        return self._record({name: self._table.column(name)[int(row)].as_py() for name in names})

    def __iter__(self) -> Iterator[ImageRecord]:
        """All rows in their order; much faster than one by one."""
        for batch in self._table.to_batches(_BATCH_ROWS):
            columns = batch.to_pydict()
            for cells in zip(*columns.values(), strict=True):
                yield self._record(dict(zip(columns, cells, strict=True)))

    def _record(self, found: dict[str, Any]) -> ImageRecord:
        if isinstance(found["sha256"], bytes):
            found["sha256"] = found["sha256"].hex()
        if "captions" in found:
            found["captions"] = tuple(found["captions"] or ())
        found["root"] = self._roots.get(found["source"], found["root"])
        return ImageRecord(**found)

    def path(self, row: int) -> Path:
        """The absolute path of a row's file."""
        root = self._roots.get(self._of("source", row)) or self._of("root", row)
        return Path(root) / self._of("path", row)

    def pixels(self, row: int) -> PixelFormat | None:
        """How the values of a row's file are seen; None for 8-bit RGB."""
        return self._pixels.get(self._of("source", row)) if self._pixels else None

    def _of(self, column: str, row: int) -> str:
        return str(self._table.column(column)[int(row)].as_py())

    @property
    def num_bytes(self) -> int:
        """Bytes of the columns, which the processes of a machine share where they are mapped."""
        return int(self._table.nbytes)

    @property
    def is_deep(self) -> bool:
        """Whether any picture is seen with 16 bits a channel; then all are, so that they go into one batch."""
        return any(found is not None and found.is_deep for found in self._pixels.values())

    @property
    def num_channels(self) -> int:
        """The number of channels of all pictures as models see them."""
        return next((found.num_channels for found in self._pixels.values() if found is not None), 3)

    @property
    def captions(self) -> list[str | None]:
        found: list[str | None] = plain(self._table, "caption", pa.string()).to_pylist()
        return found

    @property
    def labels(self) -> list[str | None]:
        found: list[str | None] = plain(self._table, "label", pa.string()).to_pylist()
        return found

    @property
    def clusters(self) -> NDArray[np.int64]:
        pieces = list(numbers(self._table, "cluster"))
        return np.concatenate([np.empty(0, np.int64), *pieces]).astype(np.int64)

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """How often each row is drawn beside others; None where all are drawn alike."""
        if _WEIGHT.name not in self._table.column_names:
            return None
        return np.concatenate([np.empty(0), *numbers(self._table, _WEIGHT.name)]).astype(np.float64)

    @property
    def components(self) -> list[str]:
        """The names of the components that have rows, sorted."""
        retrieved = {RETRIEVED} if _RETRIEVED.name in self._table.column_names else set()
        return sorted({*values(self._table, "component")} | retrieved)

    def rows_of(self, component: str) -> NDArray[np.int64]:
        """Row numbers of one component, ascending; empty if it has none."""
        if component != RETRIEVED:
            return rows_with(self._table, "component", component)
        if _RETRIEVED.name not in self._table.column_names:
            return np.empty(0, np.int64)
        pieces = list(numbers(self._table, _RETRIEVED.name))
        return np.flatnonzero(np.concatenate(pieces)).astype(np.int64)

    @property
    def sources(self) -> list[str]:
        """The names of the datasets that have rows, sorted."""
        return values(self._table, "source")

    def rows_from(self, source: str) -> NDArray[np.int64]:
        """Row numbers of one dataset, whatever their component, ascending; empty if it has none."""
        return rows_with(self._table, "source", source)

    @property
    def chosen(self) -> list[str]:
        """The names of the components that training draws from unless it is told otherwise, sorted."""
        return [name for name in self.components if name not in (LEFT_OUT, HELD_OUT)]

    def save(self, folder: Path) -> Path:
        """Writes `index.parquet` into an existing folder."""
        schema = _SCHEMA
        for field in (_CAPTIONS, _RETRIEVED, _WEIGHT):
            if field.name in self._table.column_names:
                schema = schema.append(field)
        columns = {
            field.name: pa.array(range(len(self)), type=field.type)
            if field.name == "id"
            else plain(self._table, field.name, field.type)
            for field in schema
        }
        if any(self._pixels.values()):
            told = {name: found and found.record() for name, found in self._pixels.items()}
            schema = schema.with_metadata({_PIXELS: json.dumps(told)})
        path = folder / FILE
        pq.write_table(pa.table(columns, schema=schema), path)
        return path

    @classmethod
    def load(cls, folder: Path, roots: Mapping[str, str] | None = None) -> ImageIndex:
        """Reads `index.parquet` of a folder.

        Args:
            folder: of the index.
            roots: the absolute folders of datasets by name, in place of those that they had when the index was
                made; sources that are not named stay where they were.

        Raises:
            UserError: there is none, it cannot be read, lacks columns, or names a file outside its folder.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError("there is no photo index here", where=str(path), hint="run a curate stage first")
        try:
            with pq.ParquetFile(path) as file:
                pixels = _pixels_of(file)
                missing = [name for name in _SCHEMA.names if name not in file.schema_arrow.names]
                if missing:
                    what = f"the photo index is missing the columns {', '.join(missing)}"
                    raise UserError(what, where=str(path))
                place = mapped_file(path)
                table = open_mapped(place)
                if table is None:
                    table = write_mapped(place, _read(file, path))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"the photo index cannot be read: {first_line(error)}", where=str(path)
            ) from error
        found = cls((), pixels)
        found._table, found._roots = table, dict(roots or {})
        return found


def _values(rows: Sequence[ImageRecord], name: str) -> list[Any]:
    if name == _CAPTIONS.name:
        return [list(row.captions) or None for row in rows]
    return [getattr(row, name) for row in rows]


def _is_told(rows: Sequence[ImageRecord], name: str) -> bool:
    """Whether any picture has something else there than its default."""
    default = {_CAPTIONS.name: (), _RETRIEVED.name: False, _WEIGHT.name: 1.0}[name]
    return any(getattr(row, name) != default for row in rows)


def _read(file: pq.ParquetFile, path: Path) -> pa.Table:
    """The columns of an index file in their compact form."""
    known = {field.name for field in (*_SCHEMA, *_MORE)}
    names = [name for name in file.schema_arrow.names if name in known]
    # `read_table` would import `pyarrow.dataset` and pandas for it, in every worker.
    table = file.read(columns=names)
    # Names of photographs may hold anything that a file system takes, but no way out of the folder.
    for chunk in table.column("path").chunks:
        outside = next((name for name in chunk.to_pylist() if _leads_out(name)), None)
        if outside is not None:
            raise UserError(
                f"the photo index names a file outside its folder: {outside!r:.80}", where=str(path)
            )
    return compact(table)


def pixels_in(folder: Path) -> PixelFormat | None:
    """How models see the pictures of an index, whose rows are not read; None for 8-bit RGB.

    Where datasets differ in bands or range, only the mean and the deviation are told, which all share.

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    try:
        with pq.ParquetFile(folder / FILE) as file:
            formats = _pixels_of(file)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"the photo index cannot be read: {first_line(error)}", where=str(folder / FILE)
        ) from error
    told = [found for found in formats.values() if found is not None]
    if len(set(formats.values())) == 1 or not told:
        return told[0] if told else None
    if told[0].num_channels != 3:
        # The numbers of bands differ no further than their names: mean and deviation need as many.
        return told[0].model_copy(update={"range": None, "shown": None})
    return PixelFormat(mean=told[0].mean, std=told[0].std)


def _pixels_of(file: pq.ParquetFile) -> dict[str, PixelFormat | None]:
    told = (file.schema_arrow.metadata or {}).get(_PIXELS)
    formats = json.loads(told) if told else {}
    return {name: one and PixelFormat.model_validate(one) for name, one in formats.items()}


def _leads_out(path: str) -> bool:
    return path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts
