"""Datasets in a bucket of S3: objects are listed with their ETags, and read by ranges, each when it is needed.

A path of the file system stands for an object, so that all that reads pictures takes both: `s3://bucket/web/a.jpg` is
`s3:/bucket/web/a.jpg` as a path, which no folder of a machine has for a name.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.sources.byte_range import ByteRange
from orchestrator.data.sources.digests import FileStamp
from orchestrator.storage.s3_client import Patience, code_of, make_client, plain_errors

_SCHEME = "s3:/"
_PAGE = 1000
# Of an object whose size is not known yet so many bytes are asked for first: most photos whole.
FIRST_BYTES = 1 << 20
# Headers of a shard lie as far apart as its photos are large.
HEADER_BYTES = 1 << 18

_made: tuple[int, Any] | None = None


@dataclass(frozen=True)
class RemoteObject:
    """An object below a dataset's address: its path from there, its size, and what tells its content from another."""

    path: str
    size: int
    etag: str
    modified_ns: int

    @property
    def tag(self) -> str:
        """Tells its content from another's, as a digest does for a file."""
        return f"etag {self.etag} of {self.size} bytes"

    @property
    def stamp(self) -> FileStamp:
        """As a file's, for what is remembered of it: the ETag is in the place of the time of the inode's change."""
        etag = int.from_bytes(hashlib.sha256(self.etag.encode()).digest()[:8], "big")
        return FileStamp(self.size, self.modified_ns, etag % 10**9)


def is_remote(path: Path | str) -> bool:
    """Whether a path stands for an object, or for a prefix of objects."""
    return os.fspath(path).startswith(_SCHEME)


def uri(path: Path | str) -> str:
    """The address of what a path stands for."""
    bucket, key = _split(path)
    return f"s3://{bucket}/{key}".rstrip("/")


def objects(root: Path) -> Iterator[RemoteObject]:
    """All objects below a dataset's address.

    Raises:
        UserError: the bucket or the credentials are wrong.
        StoreError: (an OSError) the server does not answer.
    """
    bucket, key = _split(root)
    prefix = f"{key.rstrip('/')}/" if key else ""
    with plain_errors(bucket, f"list {uri(root)}"):
        pages = (
            _client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": _PAGE})
        )
        for page in pages:
            for item in page.get("Contents", ()):
                path = item["Key"].removeprefix(prefix)
                # Consoles make empty objects that end in a slash.
                if path and not path.endswith("/"):
                    modified = int(item["LastModified"].timestamp() * 10**9)
                    yield RemoteObject(path, int(item["Size"]), item["ETag"].strip('"'), modified)


def open_object(
    path: Path | str, offset: int = 0, length: int | None = None, block: int = FIRST_BYTES
) -> tuple[io.BufferedReader, int]:
    """An object, or a part of it, open for reading, and its size in bytes; what is read is fetched by ranges.

    Args:
        path: of the object.
        offset, length: of the part.
        block: bytes that are fetched at once, unless more are asked for.

    Raises:
        FileNotFoundError: there is none.
        UserError, StoreError: see :func:`objects`.
    """
    file = _RangeFile(path, offset, length, block)
    return io.BufferedReader(file, buffer_size=max(1, min(block, file.length))), file.length


class _RangeFile(ByteRange):
    """Bytes of an object as a file that is read by ranges. One range is kept."""

    def __init__(self, path: Path | str, offset: int, length: int | None, block: int) -> None:
        super().__init__()
        self._bucket, self._key = _split(path)
        self._start, self._block = offset, block
        self._window, self._window_at = b"", 0
        # A part that is small is fetched whole, and nothing behind it.
        self.length = block if length is None else length
        self._window, size = self._fetch(0, min(block, self.length))
        self.length = max(0, size - offset) if length is None else min(length, max(0, size - offset))

    def _read_into(self, view: memoryview) -> int:
        if not self._window_at <= self._at < self._window_at + len(self._window):
            count = min(max(len(view), self._block), self.length - self._at)
            self._window, self._window_at = self._fetch(self._at, count)[0], self._at
        begin = self._at - self._window_at
        found = self._window[begin : begin + len(view)]
        view[: len(found)] = found
        return len(found)

    def _fetch(self, at: int, count: int) -> tuple[bytes, int]:
        """Bytes from `at` on, at most `count`; and the size of the whole object."""
        from botocore.exceptions import ClientError

        first = self._start + at
        name = f"s3://{self._bucket}/{self._key}"
        with plain_errors(self._bucket, f"give {name}"):
            try:
                reply = _client().get_object(
                    Bucket=self._bucket, Key=self._key, Range=f"bytes={first}-{first + max(count, 1) - 1}"
                )
            except ClientError as error:
                # No byte of it is there: it is empty, or ends before.
                if code_of(error) in ("InvalidRange", "416"):
                    return b"", 0
                raise
            data = reply["Body"].read()
        total = str(reply.get("ContentRange", "")).rpartition("/")[2]
        return data, int(total) if total.isdigit() else first + len(data)


def _split(path: Path | str) -> tuple[str, str]:
    bucket, _, key = os.fspath(path).removeprefix("s3:").lstrip("/").partition("/")
    return bucket, key


def _client() -> Any:
    """This process's; connections do not survive a fork."""
    global _made
    if _made is None or _made[0] != os.getpid():
        _made = os.getpid(), make_client(Patience())
    return _made[1]
