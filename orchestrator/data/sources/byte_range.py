"""A range of bytes, of a file or of an object in a bucket, as a file of its own that can be sought in."""

from __future__ import annotations

import io
from abc import abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ByteRange(io.RawIOBase):
    """So many bytes, read from wherever a subclass has them.

    Attributes:
        length: in bytes.
    """

    length: int

    def __init__(self) -> None:
        self._at = 0

    @abstractmethod
    def _read_into(self, view: memoryview) -> int:
        """Fill a part of `view` with bytes from `self._at` on, and say how many. `view` ends within the range."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        # A slice of a bytearray would be a copy of it.
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.length - self._at)
        read = self._read_into(view[:wanted]) if wanted > 0 else 0
        self._at += read
        return read

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if at < 0:
            raise ValueError(f"seek to {at}")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at
