"""The table of photographs that training reads: one row a picture, in columns, as `index.parquet`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.errors import UserError
from orchestrator.spec import MAX_PIXELS

FILE = "index.parquet"

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


@dataclass(frozen=True)
class PhotoRow:
    """One picture: where it is, what is known of it, and which part of the training mix it belongs to.

    `path` is relative (posix) to the absolute folder `root`; `cluster` is -1 where there was no clustering.
    """

    source: str
    path: str
    root: str
    sha256: str
    width: int
    height: int
    caption: str | None = None
    label: str | None = None
    component: str = "pool"
    cluster: int = -1
    duplicate_of: str | None = None

    @property
    def max_pixels(self) -> int:
        """The largest width × height at which the file can still be the picture that was indexed."""
        return max(MAX_PIXELS, self.width * self.height)


class PhotoIndex:
    """Photographs by row number (the id that sample orders and blocks speak of).

    Pictures are referenced, not copied: `root` is an absolute folder on this machine, and sha256 tells
    whether a file is still the one that was indexed.
    """

    def __init__(self, rows: Sequence[PhotoRow]) -> None:
        self._rows = tuple(rows)
        self._paths = [Path(row.root) / row.path for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> PhotoRow:
        return self._rows[row]

    def path(self, row: int) -> Path:
        """The absolute path of a row's file."""
        return self._paths[row]

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
    def components(self) -> list[str]:
        """The names of the components that have rows, sorted."""
        return sorted({row.component for row in self._rows})

    def rows_of(self, component: str) -> NDArray[np.int64]:
        """Row numbers of one component, ascending; empty if it has none."""
        return np.array([i for i, row in enumerate(self._rows) if row.component == component], dtype=np.int64)

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
        pq.write_table(pa.table(columns, schema=_SCHEMA), path)
        return path

    @classmethod
    def load(cls, folder: Path) -> PhotoIndex:
        """Reads `index.parquet` of a folder.

        Raises:
            UserError: there is none, or it lacks columns.
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError("there is no photo index here", where=str(path), hint="run a curate stage first")
        columns = pq.read_table(path).to_pydict()
        missing = [name for name in _SCHEMA.names if name not in columns]
        if missing:
            raise UserError(f"the photo index lacks the columns {', '.join(missing)}", where=str(path))
        names = [name for name in _SCHEMA.names if name != "id"]
        by_row = zip(*(columns[name] for name in names), strict=True)
        return cls([PhotoRow(**dict(zip(names, values, strict=True))) for values in by_row])
