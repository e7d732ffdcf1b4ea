"""Pictures in shards have paths like any other: `train-000.tar::1536:20480::0001.jpg`.

These are 20,480 bytes from byte 1,536 of `train-000.tar`, which the shard calls `0001.jpg`. In a Parquet file,
`a.parquet::3:17::0001.jpg` is row 17 of row group 3. So the index, sample orders and readers know nothing of shards,
but for :func:`open_member`.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import cast

from orchestrator.data.sources import parquet_shards
from orchestrator.data.sources.byte_range import ByteRange
from orchestrator.data.sources.remote import open_object
from orchestrator.fsio import NotAFileError, open_regular

# Bytes of a picture in a shard in a bucket that one request asks for.
_MOST_AT_ONCE = 16 << 20
# The first place counts: what follows it is a name, whatever that looks like.
_MEMBER = re.compile(r"(.+?\.(?:tar|parquet))::(\d{1,18}):(\d{1,18})::.+", re.DOTALL | re.IGNORECASE)


def member_path(shard: str, offset: int, length: int, member: str) -> str:
    """The path of a picture in a shard.

    Args:
        shard: the shard's path.
        offset, length: of the picture in it, in bytes; in a Parquet file its row group, and its row in that.
        member: what the shard calls it.
    """
    return f"{shard}::{offset}:{length}::{member}"


def open_member(path: Path | str) -> tuple[io.BufferedReader, int] | None:
    """A picture in a shard or in a bucket, open for reading, and its size in bytes; None for any other path.

    Raises:
        NotAFileError: the shard is not a regular file, or ends before the picture.
        OSError: it cannot be opened.
    """
    text = os.fspath(path)
    found = _MEMBER.fullmatch(text) if "::" in text else None
    if found is None:
        return open_object(text) if text.startswith("s3:/") else None
    offset, length = int(found[2]), int(found[3])
    if found[1].lower().endswith(".parquet"):
        data = parquet_shards.picture(found[1], offset, length)
        return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(data))), len(data)
    if text.startswith("s3:/"):
        part, size = open_object(found[1], offset, length, block=max(1, min(length, _MOST_AT_ONCE)))
        if size < length:
            part.close()
            raise NotAFileError(0, "the shard ends before it", text)
        return part, size
    file = open_regular(found[1])
    if offset + length > os.fstat(file.fileno()).st_size:
        file.close()
        raise NotAFileError(0, "the shard ends before it", str(path))
    return io.BufferedReader(_Part(file, offset, length)), length


def shard_of(path: str) -> str:
    """The path of the file that a picture's bytes are in: of the picture, or of its shard."""
    found = _MEMBER.fullmatch(path)
    return path if found is None else found[1]


class _Part(ByteRange):
    """Bytes of an open file as a file of their own; the file is closed with it."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self.length = file, offset, length
        file.seek(offset)

    def _read_into(self, view: memoryview) -> int:
        return self._file.readinto(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = super().seek(offset, whence)
        self._file.seek(self._start + min(at, self.length))
        return at

    def close(self) -> None:
        self._file.close()
        super().close()
