"""One worker's shards as a safetensors file, hashed while it is written. No torch here."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import make_folder, replacing

# Bytes written at once, and bytes that a reader can compare by themselves.
_PIECE = 8 * 2**20
PART = 4 * 2**20


@dataclass(frozen=True)
class TensorSlot:
    """`length` elements from `offset` of a tensor of `numel`, at `start` of this worker's file, in elements."""

    start: int
    length: int
    offset: int
    numel: int


def file_header(slots: Mapping[str, TensorSlot]) -> bytes:
    """A safetensors header for fp32 shards that follow each other, padded to 8 bytes.

    Its metadata says where each shard lies in its tensor, as `torch.distributed.checkpoint.hf_storage` writes it.
    """
    full = {key: slot for key, slot in slots.items() if slot.length}
    places = {key: {"saved_offsets": [slot.offset]} for key, slot in full.items()}
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(places)}
    }
    for key, slot in full.items():
        span = [4 * slot.start, 4 * (slot.start + slot.length)]
        header[key] = {"dtype": "F32", "shape": [slot.length], "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_file(path: Path, header: bytes, data: memoryview) -> dict[str, Any]:
    """Write `header` and `data` so that `path` is whole and durable or not there.

    Returns:
        What a manifest says of the file: its `size` and `sha256`, and the sha256 of each of its `parts` of
        `part_bytes`, so that who reads some of them need not read the others to compare them.

    Raises:
        OSError: it cannot be written. A disk without room for all of it is not filled to the brim first.
    """
    make_folder(path.parent)
    needed = len(header) + data.nbytes
    if shutil.disk_usage(path.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    digest, parts = hashlib.sha256(), _Parts()
    with replacing(path, only_writer=True) as draft, draft.open("wb") as file:
        for piece in _pieces(header, data):
            file.write(piece)
            digest.update(piece)
            parts.update(piece)
    BYTES.written("checkpoint", needed)
    return {"size": needed, "sha256": digest.hexdigest(), "part_bytes": PART, "parts": parts.digests()}


class _Parts:
    """The sha256 of each part of what it is given."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._digest, self._length = hashlib.sha256(), 0

    def update(self, piece: bytes | memoryview) -> None:
        rest = memoryview(piece)
        while rest:
            taken, rest = rest[: PART - self._length], rest[PART - self._length :]
            self._digest.update(taken)
            self._length += len(taken)
            if self._length == PART:
                self._done.append(self._digest.hexdigest())
                self._digest, self._length = hashlib.sha256(), 0

    def digests(self) -> list[str]:
        return [*self._done, *([self._digest.hexdigest()] if self._length else [])]


def _pieces(header: bytes, data: memoryview) -> Iterator[bytes | memoryview]:
    yield header
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]
