"""The table of photographs that training reads: one row a picture, in columns, as `index.parquet`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import MAX_PIXELS
from orchestrator.data.curation.components import HELD_OUT, LEFT_OUT, RETRIEVED, UNCURATED
from orchestrator.errors import UserError, first_line

FILE = "index.parquet"
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
        self._rows = tuple(rows)
        self._pixels = dict(pixels or {})
        self._paths = [Path(row.root) / row.path for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> ImageRecord:
        return self._rows[row]

    def path(self, row: int) -> Path:
        """The absolute path of a row's file."""
        return self._paths[row]

    def pixels(self, row: int) -> PixelFormat | None:
        """How the values of a row's file are seen; None for 8-bit RGB."""
        return self._pixels.get(self._rows[row].source)

    @property
    def is_deep(self) -> bool:
        """Whether any picture is seen with 16 bits a channel; then all are, so that they go into one batch."""
        return any(found is not None and found.is_deep for found in self._pixels.values())

    @property
    def captions(self) -> list[str | None]:
        return [row.caption for row in self._rows]

    @property
    def labels(self) -> list[str | None]:
        return [row.label for row in self._rows]

    @property
    def clusters(self) -> NDArray[np.int64]:
        return np.array([row.cluster for row in self._rows], dtype=np.int64)

    @property
    def weights(self) -> NDArray[np.float64] | None:
        """How often each row is drawn beside others; None where all are drawn alike."""
        weights_N = np.array([row.weight for row in self._rows], dtype=np.float64)
        return None if np.all(weights_N == 1) else weights_N

    @property
    def components(self) -> list[str]:
        """The names of the components that have rows, sorted."""
        retrieved = {RETRIEVED} if any(row.retrieved for row in self._rows) else set()
        return sorted({row.component for row in self._rows} | retrieved)

    def rows_of(self, component: str) -> NDArray[np.int64]:
        """Row numbers of one component, ascending; empty if it has none."""
        if component == RETRIEVED:
            return np.array([i for i, row in enumerate(self._rows) if row.retrieved], dtype=np.int64)
        return np.array([i for i, row in enumerate(self._rows) if row.component == component], dtype=np.int64)

    @property
    def sources(self) -> list[str]:
        """The names of the datasets that have rows, sorted."""
        return sorted({row.source for row in self._rows})

    def rows_from(self, source: str) -> NDArray[np.int64]:
        """Row numbers of one dataset, whatever their component, ascending; empty if it has none."""
        return np.array([i for i, row in enumerate(self._rows) if row.source == source], dtype=np.int64)

    @property
    def chosen(self) -> list[str]:
        """The names of the components that training draws from unless it is told otherwise, sorted."""
        return [name for name in self.components if name not in (LEFT_OUT, HELD_OUT)]

    def save(self, folder: Path) -> Path:
        """Writes `index.parquet` into an existing folder."""
        columns = {
            field.name: pa.array(
                range(len(self)) if field.name == "id" else [getattr(row, field.name) for row in self._rows],
                type=field.type,
            )
            for field in _SCHEMA
        }
        path = folder / FILE
        schema = _SCHEMA
        if any(row.captions for row in self._rows):
            schema = schema.append(_CAPTIONS)
            columns[_CAPTIONS.name] = pa.array(
                [list(row.captions) or None for row in self._rows], type=_CAPTIONS.type
            )
        if any(row.retrieved for row in self._rows):
            schema = schema.append(_RETRIEVED)
            columns[_RETRIEVED.name] = pa.array([row.retrieved for row in self._rows], type=_RETRIEVED.type)
        if (weights_N := self.weights) is not None:
            schema = schema.append(_WEIGHT)
            columns[_WEIGHT.name] = pa.array(weights_N, type=_WEIGHT.type)
        if any(self._pixels.values()):
            told = {name: found and found.model_dump(mode="json") for name, found in self._pixels.items()}
            schema = schema.with_metadata({_PIXELS: json.dumps(told)})
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
            # `read_table` would import `pyarrow.dataset` and pandas for it, in every worker.
            with pq.ParquetFile(path) as file:
                columns = file.read().to_pydict()
                pixels = _pixels_of(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"the photo index cannot be read: {first_line(error)}", where=str(path)
            ) from error
        missing = [name for name in _SCHEMA.names if name not in columns]
        if missing:
            raise UserError(f"the photo index is missing the columns {', '.join(missing)}", where=str(path))
        names = [name for name in _SCHEMA.names if name != "id"]
        if _CAPTIONS.name in columns:
            names.append(_CAPTIONS.name)
            columns[_CAPTIONS.name] = [tuple(several or ()) for several in columns[_CAPTIONS.name]]
        names += [field.name for field in (_WEIGHT, _RETRIEVED) if field.name in columns]
        by_row = zip(*(columns[name] for name in names), strict=True)
        rows = [ImageRecord(**dict(zip(names, values, strict=True))) for values in by_row]
        # Names of photographs may hold anything that a file system takes, but no way out of the folder.
        outside = next((row.path for row in rows if _leads_out(row.path)), None)
        if outside is not None:
            raise UserError(
                f"the photo index names a file outside its folder: {outside!r:.80}", where=str(path)
            )
        if roots:
            rows = [replace(row, root=roots.get(row.source, row.root)) for row in rows]
        return cls(rows, pixels)


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
    return PixelFormat(mean=told[0].mean, std=told[0].std)


def _pixels_of(file: pq.ParquetFile) -> dict[str, PixelFormat | None]:
    told = (file.schema_arrow.metadata or {}).get(_PIXELS)
    formats = json.loads(told) if told else {}
    return {name: one and PixelFormat.model_validate(one) for name, one in formats.items()}


def _leads_out(path: str) -> bool:
    return path.startswith("/") or "\0" in path or ".." in PurePosixPath(path).parts
