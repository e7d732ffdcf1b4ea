"""Files of embeddings: Parquet with a row an image, written and read in parts, so that memory does not grow with them.

Columns: `path` (relative to the folder, posix), `sha256` and `bytes` of the file, `vector` (a list of fixed size of
float32, of length 1). The footer's metadata has how they were made, and what was left out, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator import disk
from orchestrator.data.sources.folder import LeftOut
from orchestrator.errors import UserError, first_line, shortened
from orchestrator.fsio import open_regular, replacing, why

Floats = NDArray[np.float32]

_FORMAT = 1
_KEY = "orchestrator.embeddings"
# The most bytes of a row group's vectors, and the most rows. It is what a reader holds at once, and what the writer
# collects: of short vectors names and digests take more than the vectors do.
_GROUP_BYTES, _GROUP_ROWS = 8 << 20, 8192
# As in the report of `curate`.
_LISTED = 1000
_HINT = "make it with `orchestrator embed`"


@dataclass(frozen=True)
class Made:
    """How the vectors of a file were made: with the same, the same folder gives the same vectors.

    Attributes:
        model: by which the model is found: `NAME:VERSION` of a registered model, or the absolute path of its folder.
        weights: the sha256 of the model's files, see :func:`orchestrator.inference.reference.weights_digest`.
        size: pixels a side at which images were seen.
        folder: the absolute path of the images' folder.
        listing: a digest of the names, sizes and times of change of its images.
    """

    model: str
    weights: str
    size: int
    folder: str
    listing: str


class EmbeddedFile(NamedTuple):
    """An image file: its path relative to the folder (posix), the sha256 of its content, its size in bytes."""

    path: str
    sha256: str
    bytes: int


class EmbeddingsWriter:
    """Writes row groups as they become full; made by :func:`writing`."""

    def __init__(self, path: Path, made: Made, group_rows: int | None) -> None:
        self._path, self._made, self._group_rows = path, made, group_rows
        self._writer: pq.ParquetWriter | None = None
        self._files: list[EmbeddedFile] = []
        self._vectors: list[Floats] = []

    def add(self, files: Sequence[EmbeddedFile], vectors_ND: Floats) -> None:
        """Rows, in their final order."""
        if self._writer is None:
            width = vectors_ND.shape[1]
            self._group_rows = self._group_rows or max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * width)))
            self._writer = pq.ParquetWriter(
                # Vectors do not compress, and are not a dictionary.
                self._path, schema_of(width), compression="none", use_dictionary=False,
            )  # fmt: skip
        self._files += files
        self._vectors.append(vectors_ND)
        assert self._group_rows is not None
        while len(self._files) >= self._group_rows:
            self._write(self._group_rows)

    def finish(self, other: Sequence[LeftOut], unreadable: Sequence[LeftOut]) -> None:
        """Write what is left, and what was left out of the folder. There has to be a row.

        Args:
            other: files that are no images.
            unreadable: images that could not be decoded.
        """
        assert self._writer is not None
        if self._files:
            self._write(len(self._files))
        left_out = (*other, *unreadable)
        record = {
            "format": _FORMAT,
            **asdict(self._made),
            "left_out": dict(Counter(item.reason for item in left_out).most_common(_LISTED)),
            "left_out_files": {item.path: item.reason for item in left_out[:_LISTED]},
            "unreadable": len(unreadable),
        }
        self._writer.add_key_value_metadata({_KEY: json.dumps(record)})
        self._writer.close()
        self._writer = None

    def abandon(self) -> None:
        """Close the file as it is; :func:`writing` removes it."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, count: int) -> None:
        assert self._writer is not None
        vectors_ND = np.concatenate(self._vectors)
        files, self._files = self._files[:count], self._files[count:]
        written_ND, self._vectors = vectors_ND[:count], [vectors_ND[count:]]
        schema = self._writer.schema
        columns = columns_of(files, written_ND, schema)
        self._writer.write_table(pa.table(columns, schema=schema), row_group_size=count)


@contextlib.contextmanager
def writing(path: Path, made: Made, *, group_rows: int | None = None) -> Iterator[EmbeddingsWriter]:
    """Write a file of embeddings that appears when it is whole; one that is there is replaced.

    Args:
        path: of the file, in a folder that is there.
        made: how the vectors are made.
        group_rows: rows of a row group. Default: as many as have 8 MiB of vectors, at most 8,192.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    with replacing(path) as draft:
        writer = EmbeddingsWriter(draft, made, group_rows)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(OSError, pa.ArrowException):
                writer.abandon()
            raise


class Embeddings:
    """A file of embeddings, open for reading; made by :func:`open_embeddings`.

    Attributes:
        made: how its vectors were made.
        num_rows: of images.
        dim: of a vector.
        num_unreadable: images below the folder that could not be decoded; they have no vector.
    """

    def __init__(self, path: Path, file: pq.ParquetFile, record: dict[str, object]) -> None:
        self._path, self._file = path, file
        self.made = Made(**{name: record[name] for name in Made.__dataclass_fields__})  # type: ignore[arg-type]
        unreadable = record.get("unreadable")
        self.num_unreadable = unreadable if isinstance(unreadable, int) else 0
        self.num_rows: int = file.metadata.num_rows
        self.dim: int = file.schema_arrow.field("vector").type.list_size

    def blocks(self, rows: int = 8192) -> Iterator[tuple[pa.StringArray, Floats]]:
        """Paths (n,) and vectors (n, D) of at most `rows` images at a time, in the order of the file.

        Raises:
            UserError: the file is damaged.
        """
        try:
            for batch in self._file.iter_batches(rows, columns=["path", "vector"]):
                paths, vectors = batch.column("path"), batch.column("vector")
                values = vectors.flatten()
                if vectors.null_count or values.null_count or paths.null_count:
                    raise ValueError("a row has no vector")
                yield paths, values.to_numpy().reshape(len(paths), self.dim)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(self._path, error) from error


@contextlib.contextmanager
def open_embeddings(path: Path) -> Iterator[Embeddings]:
    """A file that :func:`writing` wrote.

    Raises:
        UserError: there is none, or it is another file, or damaged.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_regular(path))
            parquet = stack.enter_context(pq.ParquetFile(file))
            record = json.loads((parquet.metadata.metadata or {})[_KEY.encode()])
            if record["format"] > _FORMAT:
                raise UserError(
                    "a newer version wrote this file of embeddings",
                    where=str(path),
                    hint="upgrade, or embed again",
                )
            vectors = parquet.schema_arrow.field("vector").type
            if not pa.types.is_fixed_size_list(vectors) or vectors.value_type != pa.float32():
                raise ValueError("its vectors are not lists of fixed size of float32")
            if parquet.schema_arrow.field("path").type != pa.string():
                raise ValueError("its paths are not texts")
            for name in ("model", "weights", "folder", "listing"):
                if not isinstance(record[name], str) or "\0" in record[name]:
                    raise ValueError(f"`{name}` of its record is not a text")
            if not isinstance(record["size"], int) or isinstance(record["size"], bool):
                raise ValueError("`size` of its record is not a whole number")
            embeddings = Embeddings(path, parquet, record)
        except UserError:
            raise
        except KeyError as error:
            raise UserError("this is not a file of embeddings", where=str(path), hint=_HINT) from error
        except OSError as error:
            raise _damaged(path, error) from error
        except (pa.ArrowException, ValueError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
        yield embeddings


def checked_target(path: Path) -> Path:
    """A path at which a file of embeddings may be written; its folder is made if it is not there.

    Raises:
        UserError: something else has the name, or the folder cannot be made or written.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder", where=str(path), hint=f"name a file, such as {path / 'embeddings.parquet'}"
        )
    if path.exists():
        try:
            with open_embeddings(path):
                pass
        except UserError:
            raise UserError(
                f"{path} exists, and is not a file of embeddings that could be replaced",
                where=str(path),
                hint="name another file",
            ) from None
    disk.make_folder(path.parent, "name another file for --out")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        # Said before anything is embedded.
        raise UserError(
            f"no permission to write into {path.parent.absolute()}",
            where=str(path),
            hint="name a file in another folder for --out",
        )
    return path


def _damaged(path: Path, error: Exception) -> UserError:
    reason = why(error) if isinstance(error, OSError) else shortened(first_line(error), 200)
    return UserError(f"no embeddings can be read from this file: {reason}", where=str(path), hint=_HINT)


def columns_of(files: Sequence[EmbeddedFile], vectors_ND: Floats, schema: pa.Schema) -> dict[str, pa.Array]:
    """Rows by column, for a schema of :func:`schema_of`."""
    return {
        "path": pa.array([file.path for file in files], pa.string()),
        "sha256": pa.array([file.sha256 for file in files], pa.string()),
        "bytes": pa.array([file.bytes for file in files], pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(vectors_ND).reshape(-1), pa.float32()),
            type=schema.field("vector").type,
        ),
    }


def schema_of(width: int) -> pa.Schema:
    """The columns of a file of embeddings of `width` values."""
    values = pa.list_(pa.field("element", pa.float32(), nullable=False), width)
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("bytes", pa.int64(), nullable=False),
            pa.field("vector", values, nullable=False),
        ]
    )
