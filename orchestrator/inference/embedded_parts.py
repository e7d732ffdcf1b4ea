"""What an interrupted `embed` has done already: parts beside the file to be, each of them whole or not there."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.data.sources.folder import LeftOut
from orchestrator.fsio import replacing
from orchestrator.inference.embeddings import EmbeddedFile, Floats, Made, columns_of, schema_of

_KEY = b"orchestrator.embeddings.part"
EVERY_S = 10.0
"""Seconds of work in a part: so much is lost at most by whoever is interrupted."""


class EmbeddedPart(NamedTuple):
    """What became of some files of a folder, one after another in its order.

    Attributes:
        seen: the number of files up to its end, from the first one of the folder on.
        files: those with a vector.
        vectors_ND: theirs.
        unreadable: the others.
    """

    seen: int
    files: list[EmbeddedFile]
    vectors_ND: Floats
    unreadable: list[LeftOut]


class EmbeddedParts:
    """The parts of one file of embeddings, in the folder `.NAME.unfinished` beside it.

    Parts of another model, size, folder or listing, or of other batches, are of no use and go. A part that cannot be
    written is not there: the file is then made in one go.

    Args:
        out: the file of embeddings that is being made.
        made: how.
        batch: images in one forward pass, on which last bits of the vectors may depend.
        every_s: seconds of work in a part.
    """

    def __init__(self, out: Path, made: Made, batch: int, every_s: float = EVERY_S) -> None:
        self.folder = out.with_name(f".{out.name}.unfinished")
        self._identity = {**asdict(made), "batch": batch}
        self._every_s, self._began = every_s, time.monotonic()
        self._from = 0
        self._files: list[EmbeddedFile] = []
        self._vectors: list[Floats] = []
        self._unreadable: list[LeftOut] = []

    def read(self) -> Iterator[EmbeddedPart]:
        """The parts that are there, from the first file of the folder on and without a gap; the others are removed."""
        kept = []
        while (part := self._read(path := self._path(self._from))) is not None:
            self._from = part.seen
            kept.append(path)
            yield part
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if path not in kept:
                    path.unlink()
        self._began = time.monotonic()

    def add(
        self,
        files: Sequence[EmbeddedFile],
        vectors_ND: Floats,
        unreadable: Sequence[LeftOut],
        seen: int,
    ) -> None:
        """What became of the files since the last call, `seen` of them in all; writes a part when it is time."""
        self._files += files
        self._vectors.append(vectors_ND)
        self._unreadable += unreadable
        if time.monotonic() - self._began < self._every_s:
            return
        with contextlib.suppress(OSError, pa.ArrowException):
            self._write(seen)
        self._from, self._began = seen, time.monotonic()
        self._files, self._vectors, self._unreadable = [], [], []

    def remove(self) -> None:
        """The file is there: its parts go."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, first: int) -> Path:
        return self.folder / f"part-{first:010d}.parquet"

    def _write(self, seen: int) -> None:
        vectors_ND = np.concatenate(self._vectors)
        record = {
            "made": self._identity,
            "seen": seen,
            "unreadable": [[item.path, item.reason] for item in self._unreadable],
        }
        schema = schema_of(vectors_ND.shape[1]).with_metadata({_KEY: json.dumps(record).encode()})
        self.folder.mkdir(exist_ok=True)
        with replacing(self._path(self._from)) as draft:
            pq.write_table(pa.table(columns_of(self._files, vectors_ND, schema), schema=schema), draft)

    def _read(self, path: Path) -> EmbeddedPart | None:
        """A part, or None if there is none, or one that is damaged or was made otherwise."""
        try:
            table = pq.read_table(path)
            record: Any = json.loads(table.schema.metadata[_KEY])
            if record["made"] != self._identity:
                return None
            columns = {name: table[name].to_pylist() for name in ("path", "sha256", "bytes")}
            vectors = table["vector"].combine_chunks()
            values = vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)
            return EmbeddedPart(
                int(record["seen"]),
                [EmbeddedFile(*row) for row in zip(*columns.values(), strict=True)],
                np.ascontiguousarray(values, np.float32),
                [LeftOut(str(name), str(reason)) for name, reason in record["unreadable"]],
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError):
            return None
