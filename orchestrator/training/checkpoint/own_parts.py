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
from orchestrator.training.checkpoint.format import CheckpointError, problem

_LENGTH = struct.Struct("<Q")
_ELEMENT = 4


class OwnParts:
    """A shard file of which some slices are read. Bytes count as read once they were compared with their sha256.

    Of a file that an earlier version wrote, whose parts have no sha256, all is compared first.

    Args:
        folder: of the checkpoint.
        name: of the file in it.
        entry: what the manifest says of the file.

    Attributes:
        bytes_read: from the file, all in all.

    Raises:
        CheckpointError: what is read is not what was written.
    """

    def __init__(self, folder: Path, name: str, entry: Mapping[str, Any]) -> None:
        self._name, self._size = name, int(entry["size"])
        self._part_bytes, self._parts = _parts(entry)
        self.bytes_read = 0
        self._part: tuple[int, bytes] = (-1, b"")
        path = folder / name
        try:
            size = path.stat().st_size
            wrong = f"has {size} bytes instead of {self._size}" if size != self._size else None
            if wrong is None and not self._parts:
                wrong = problem(path, entry)
                self.bytes_read += self._size
            if wrong is not None:
                raise CheckpointError(f"{name} {wrong}")
            self._file = open_regular(path)
        except FileNotFoundError:
            raise CheckpointError(f"{name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
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
            data = os.pread(self._file.fileno(), self._part_bytes, number * self._part_bytes)
        except OSError as error:
            raise CheckpointError(f"{self._name} cannot be read: {error.strerror}") from error
        BYTES.read("checkpoint", len(data))
        if self._parts:
            if number >= len(self._parts) or hashlib.sha256(data).hexdigest() != self._parts[number]:
                raise CheckpointError(f"{self._name} differs from its sha256")
            self.bytes_read += len(data)
        self._part = number, data
        return data


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
    return 4 * 2**20, []
