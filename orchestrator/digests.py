"""The sha256 of files, each read once a process as long as it does not change."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

# Device, inode, size and time of last change in nanoseconds: a renamed file is still the same file.
_Identity = tuple[int, int, int, int]
# A file system's clock may tick this slowly: a file changed later than that may change again and look the same.
_TICK_NS = 20_000_000


class Digests:
    """Digests of the files that this process has read. Safe to use from several threads.

    Attributes:
        bytes_read: all that had to be read.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._known: dict[_Identity, str] = {}
        self._lock = threading.Lock()

    def of(self, path: Path) -> str:
        """The sha256 of the file in hex. Files of any size: they are read in pieces.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as file:
            began = time.time_ns()
            before = _identity(file.fileno())
            known = self._known.get(before)
            if known is not None:
                return known
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = _identity(file.fileno())
        with self._lock:
            self.bytes_read += after[2]
            if before == after and after[3] < began - _TICK_NS:
                self._known[after] = digest
        return digest


def _identity(fd: int) -> _Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


DIGESTS = Digests()
