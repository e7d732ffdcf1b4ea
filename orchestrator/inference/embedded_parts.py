"""What an interrupted `embed` has done already: parts beside the file to be, each of them whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.data.sources.folder import LeftOut
from orchestrator.fsio import open_regular, replacing
from orchestrator.inference.embeddings import EmbeddedFile, Floats, Made, columns_of, schema_of

_KEY = b"orchestrator.embeddings.part"
# Parts, and drafts of parts that somebody was killed over: nothing else in the folder is touched.
_OURS = ("part-*.parquet", ".part-*.parquet.partial-*")
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
    written is not there: the file is then made in one go. A folder that is a link, or that somebody else owns, is
    neither read nor written: beside a file in a shared folder anybody may put one.

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
        width: int | None = None
        while self._is_ours() and (part := self._read(path := self._path(self._from))) is not None:
            if width not in (None, part.vectors_ND.shape[1]):
                break
            width, self._from = part.vectors_ND.shape[1], part.seen
            kept.append(path)
            yield part
        self._clear(kept)
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
        self._clear(())
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _clear(self, kept: Sequence[Path]) -> None:
        if not self._is_ours():
            return
        with contextlib.suppress(OSError):
            for path in [path for pattern in _OURS for path in self.folder.glob(pattern)]:
                if path not in kept:
                    path.unlink()

    def _is_ours(self) -> bool:
        try:
            status = self.folder.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()

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
        self.folder.mkdir(mode=0o755, exist_ok=True)
        if not self._is_ours():
            return
        with replacing(self._path(self._from)) as draft:
            pq.write_table(pa.table(columns_of(self._files, vectors_ND, schema), schema=schema), draft)

    def _read(self, path: Path) -> EmbeddedPart | None:
        """A part, or None if there is none, or one that is damaged or was made otherwise."""
        try:
            with open_regular(path, follow=False) as file:
                table = pq.ParquetFile(file).read()
            record: Any = json.loads(table.schema.metadata[_KEY])
            if record["made"] != self._identity:
                return None
            columns = {name: table[name].to_pylist() for name in ("path", "sha256", "bytes")}
            vectors = table["vector"].combine_chunks()
            values = vectors.flatten().to_numpy().reshape(len(table), vectors.type.list_size)
            part = EmbeddedPart(
                int(record["seen"]),
                [EmbeddedFile(*row) for row in zip(*columns.values(), strict=True)],
                np.ascontiguousarray(values, np.float32),
                [LeftOut(str(name), str(reason)) for name, reason in record["unreadable"]],
            )
            # It accounts for every file from the one before it on, and for at least one.
            handled = len(part.files) + len(part.unreadable)
            return part if len(part.files) and part.seen - self._from == handled else None
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError):
            return None
