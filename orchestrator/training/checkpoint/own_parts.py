"""Slices of a shard file, read and compared with the manifest without the rest of the file. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import open_regular
from orchestrator.storage.store import HasRanges
from orchestrator.training.checkpoint.format import CheckpointError, problem

_LENGTH = struct.Struct("<Q")
_ELEMENT = 4
_PIECE = 4 * 2**20


class OwnParts:
    """A shard file of which some slices are read. Bytes count as read once they were compared with their sha256.

    Of a file that an earlier version wrote, whose parts have no sha256, all is compared first.

    Args:
        folder: of the checkpoint.
        name: of the file in it.
        entry: what the manifest says of the file.
        stored: the store and the prefix of the checkpoint's files, where they are not in the folder.

    Attributes:
        bytes_read: from the file, all in all.

    Raises:
        CheckpointError: what is read is not what was written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        entry: Mapping[str, Any],
        stored: tuple[HasRanges, str] | None = None,
    ) -> None:
        self._name, self._size = name, int(entry["size"])
        self._part_bytes, self._parts = _parts(entry)
        self.bytes_read = 0
        self._part: tuple[int, bytes] = (-1, b"")
        try:
            self._file: _Local | _Stored = (
                _Local(folder / name) if stored is None else _Stored(stored[0], stored[1] + name)
            )
            size = self._file.size
            wrong = f"has {size} bytes instead of {self._size}" if size != self._size else None
            if wrong is None and not self._parts:
                wrong = self._file.problem(entry)
                self.bytes_read += self._size
            if wrong is not None:
                raise CheckpointError(f"{name} {wrong}")
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from error
        (length,) = _LENGTH.unpack(self._bytes(0, _LENGTH.size))
        self._data = _LENGTH.size + length
        header = json.loads(self._bytes(_LENGTH.size, self._data))
        self._starts: dict[str, int] = {
            key: self._data + found["data_offsets"][0]
            for key, found in header.items()
            if key != "__metadata__"
        }

    def __enter__(self) -> OwnParts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def has(self, key: str) -> bool:
        """Whether the file has a shard of this tensor."""
        return key in self._starts

    def place(self, key: str) -> int:
        """Where a tensor's shard begins in the file; reading in this order reads each part once."""
        return self._starts[key]

    def elements(self, key: str, start: int, stop: int) -> bytearray:
        """Elements [start, stop) of a tensor's shard, as bytes of fp32."""
        first = self._starts[key]
        return self._bytes(first + _ELEMENT * start, first + _ELEMENT * stop)

    def _bytes(self, start: int, stop: int) -> bytearray:
        found = bytearray()
        while start < stop:
            number = start // self._part_bytes
            part, offset = self._compared(number), start - number * self._part_bytes
            taken = part[offset : offset + stop - start]
            if not taken:
                raise CheckpointError(f"{self._name} ends before what its header says")
            found += taken
            start += len(taken)
        return found

    def _compared(self, number: int) -> bytes:
        if self._part[0] == number:
            return self._part[1]
        try:
            data = self._file.read(number * self._part_bytes, self._part_bytes)
        except OSError as error:
            raise CheckpointError(f"{self._name} cannot be read: {error.strerror or error}") from error
        BYTES.read("checkpoint", len(data))
        if self._parts:
            if number >= len(self._parts) or hashlib.sha256(data).hexdigest() != self._parts[number]:
                raise CheckpointError(f"{self._name} differs from its sha256")
            self.bytes_read += len(data)
        self._part = number, data
        return data


class _Local:
    """A file in a folder. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.size, self._path, self._file = path.stat().st_size, path, open_regular(path)

    def read(self, start: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, start)

    def problem(self, entry: Mapping[str, Any]) -> str | None:
        """What is wrong with all of it."""
        return problem(self._path, entry)

    def close(self) -> None:
        self._file.close()


class _Stored:
    """An object of a store. Raises OSError."""

    def __init__(self, store: HasRanges, name: str) -> None:
        self._store, self._name = store, name
        status = store.stat(name)
        if status is None:
            raise FileNotFoundError(name)
        self.size = status.size

    def read(self, start: int, count: int) -> bytes:
        stop = min(start + count, self.size)
        return self._store.get_range(self._name, start, stop) if start < stop else b""

    def problem(self, entry: Mapping[str, Any]) -> str | None:
        """What is wrong with all of it."""
        whole = hashlib.sha256()
        for start in range(0, self.size, _PIECE):
            whole.update(self.read(start, _PIECE))
        return None if whole.hexdigest() == entry["sha256"] else "differs from its sha256"

    def close(self) -> None:
        """Nothing is open."""


def _parts(entry: Mapping[str, Any]) -> tuple[int, list[str]]:
    """The size of parts and their sha256; no sha256 where the manifest has none for all of the file."""
    size, parts = entry.get("part_bytes"), entry.get("parts")
    if (
        isinstance(size, int)
        and size > 0
        and isinstance(parts, list)
        and -(-entry["size"] // size) == len(parts)
    ):
        return size, parts
    return _PIECE, []
