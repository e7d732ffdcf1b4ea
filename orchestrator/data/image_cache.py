"""Images in the cache of a machine, for training that reads them once an epoch: bytes by key, in large files.

Several threads and processes read and write at once. Each writer appends to a file of its own, a shard; SQLite knows
where in which shard an image is. A checksum tells whether the bytes are those that were written: what is damaged, or
gone, is not there, and whoever asks makes it again. The cache is a help and never needed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from orchestrator.disk import LEFT_FREE, space
from orchestrator.fsio import why
from orchestrator.storage.cache_database import set_aside
from orchestrator.storage.cache_folder import cache_folder

T = TypeVar("T")

logger = logging.getLogger("orchestrator")

FOLDER = "images"
_INDEX = "index.sqlite3"
_SUFFIX = ".shard"
_GIB = 2**30
_SHARD_BYTES = 256 << 20
# Others learn so much later, in seconds, what a process has written; so often it looks how large the cache is.
_FLUSH_S = 1.0
# Images that a process may have written without others knowing: more are there only if the index cannot be written.
_MOST_UNWRITTEN = 10_000
# How often it looks again, in seconds, once there is no room.
_FULL_S = 60.0
# A shard from which nothing was read for so long, in seconds, may go. Readers say that often that they read.
_UNUSED_S = 3600.0
_TOUCH_S = 600.0
# Another process that writes the index is waited for so long, in seconds.
_BUSY_S = 2.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    key BLOB NOT NULL PRIMARY KEY, shard INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS images_of_shard ON images (shard);
"""


class _Place(NamedTuple):
    """Where the bytes of an image are, and their checksum."""

    shard: int
    start: int
    size: int
    checksum: int


@cache
def _of_process(folder: Path, limit: int, pid: int) -> ImageCache:
    """The cache in a folder that all threads of the process `pid` share."""
    return ImageCache(folder, limit)


def opened(limit_gib: float) -> ImageCache:
    """This machine's cache of images, below `$ORCHESTRATOR_CACHE`, which takes at most so many GiB."""
    return _of_process(cache_folder() / FOLDER, int(limit_gib * _GIB), os.getpid())


class ImageCache:
    """Bytes by key. Nothing here raises: what cannot be read is not there, and what cannot be written is not kept.

    Args:
        folder: made if it is not there.
        limit: bytes that all shards in the folder may take. Where there is no room, shards from which nothing was read
            for an hour go, those first that were not read for the longest time; where that is not enough, what is new
            is not kept. The disk keeps a twentieth of its room, too.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.RLock()
        self._index: sqlite3.Connection | None = None
        self._unwritten: dict[bytes, _Place] = {}
        self._shard: int | None = None
        self._end, self._room, self._is_full = 0, 0, False
        self._flushed = self._measured_at = -_FULL_S
        self._touched: dict[int, float] = {}
        self._troubles: list[str] = []
        self._warned: set[str] = set()
        atexit.register(self.flush)

    def get(self, key: bytes) -> bytes | None:
        """The bytes that were put under a key; None if there are none, or they are damaged."""
        with self._lock:
            place = self._unwritten.get(key) or self._find(key)
            if time.monotonic() - self._flushed > _FLUSH_S:
                self.flush()
        if place is None:
            return None
        data = self._read(place)
        if data is None or _checksum(key, data) != place.checksum:
            logger.info("an image in the cache %s is damaged or gone, and is made again", self._folder)
            self._forget(key)
            return None
        return data

    def put(self, key: bytes, data: bytes) -> None:
        """Keep bytes under a key, unless there are some or there is no room."""
        with self._lock:
            if key in self._unwritten or self._find(key) is not None or not self._has_room(len(data)):
                return
            if len(self._unwritten) >= _MOST_UNWRITTEN:
                self._say(f"resized photos are not kept in {self._folder}: {_INDEX} cannot be written")
                return
            try:
                shard, start = self._append(data)
            except OSError as error:
                self._is_full = True
                self._say(f"resized photos are not kept in {self._folder}: {why(error)}")
                return
            self._unwritten[key] = _Place(shard, start, len(data), _checksum(key, data))
            if time.monotonic() - self._flushed > _FLUSH_S:
                self.flush()

    def flush(self) -> None:
        """Let other processes know what this one has written."""
        with self._lock:
            self._flushed = time.monotonic()
            if not self._unwritten:
                return
            rows = [(key, *place) for key, place in self._unwritten.items()]

            def write(index: sqlite3.Connection) -> bool:
                index.execute("BEGIN IMMEDIATE")
                index.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?)", rows)
                index.execute("COMMIT")
                return True

            # Where the index is busy, they are written the next time.
            if self._query(write):
                self._unwritten.clear()

    def pop_troubles(self) -> list[str]:
        """Why something was not kept, each reason once; for whoever tells the user."""
        with self._lock:
            taken, self._troubles = self._troubles, []
        return taken

    # --- shards -------------------------------------------------------------------------------------------------

    def _append(self, data: bytes) -> tuple[int, int]:
        """Write to the end of this process's shard, and say which it is and where they begin.

        Raises:
            OSError: the disk is full, or cannot be written. The shard is as long as before.
        """
        if self._shard is None or self._end >= _SHARD_BYTES or not self._file(self._shard).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            shard = int.from_bytes(os.urandom(8), "big") >> 1
            self._file(shard).open("xb").close()
            self._shard, self._end = shard, 0
        with self._file(self._shard).open("r+b", buffering=0) as file:
            try:
                file.seek(self._end)
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self._end)
                raise
        start, self._end = self._end, self._end + len(data)
        return self._shard, start

    def _read(self, place: _Place) -> bytes | None:
        path = self._file(place.shard)
        try:
            with path.open("rb", buffering=0) as file:
                # A damaged index may name more bytes than there is memory.
                if place.start + place.size > os.fstat(file.fileno()).st_size:
                    return None
                data = os.pread(file.fileno(), place.size, place.start)
        except OSError:
            return None
        now = time.monotonic()
        if now - self._touched.get(place.shard, -_TOUCH_S) >= _TOUCH_S:
            self._touched[place.shard] = now
            # Others read what belongs to another user, or is on a disk that may only be read.
            with contextlib.suppress(OSError):
                os.utime(path)
        return data

    def _file(self, shard: int) -> Path:
        return self._folder / f"{shard:016x}{_SUFFIX}"

    def _has_room(self, size: int) -> bool:
        now = time.monotonic()
        if size > self._room or now - self._measured_at > _FLUSH_S:
            if self._is_full and now - self._measured_at < _FULL_S:
                return False
            self._measured_at, self._room = now, self._measured_room(size)
            self._is_full = size > self._room
        if self._is_full:
            return False
        self._room -= size
        return True

    def _measured_room(self, size: int) -> int:
        """Bytes that may be written, after what nobody reads has made room."""
        sizes: dict[int, tuple[float, int]] = {}
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if path.suffix == _SUFFIX:
                    with contextlib.suppress(OSError, ValueError):
                        status = path.stat()
                        sizes[int(path.stem, 16)] = status.st_mtime, status.st_size
        try:
            free, total = space(self._folder)
        except OSError as error:  # a folder that may not be looked into, or whose name is too long
            self._say(f"resized photos are not kept in {self._folder}: {why(error)}")
            return 0
        taken = sum(one for _, one in sizes.values())
        of_limit, of_disk = self._limit - taken, free - int(LEFT_FREE * total)
        for shard, (used, one) in sorted(sizes.items(), key=lambda item: item[1]):
            if min(of_limit, of_disk) >= size or time.time() - used < _UNUSED_S:
                break
            if self._remove(shard):
                of_limit, of_disk = of_limit + one, of_disk + one
        if of_disk < size:
            free_share = f"the disk of {self._folder} has less than {LEFT_FREE:.0%} free"
            self._say(f"no more resized photos are kept: {free_share}. Others are decoded each time")
        elif of_limit < size:
            reached = f"those in {self._folder} take all of image_cache_gib ({self._limit / _GIB:g})"
            self._say(f"no more resized photos are kept: {reached}. Others are decoded each time")
        return max(0, min(of_limit, of_disk))

    def _remove(self, shard: int) -> bool:
        try:
            self._file(shard).unlink()
        except OSError:
            return False
        self._query(lambda index: index.execute("DELETE FROM images WHERE shard = ?", (shard,)))
        return True

    # --- the index ----------------------------------------------------------------------------------------------

    def _find(self, key: bytes) -> _Place | None:
        query = "SELECT shard, start, size, checksum FROM images WHERE key = ?"
        found = self._query(lambda index: index.execute(query, (key,)).fetchone())
        return None if found is None else _Place(*found)

    def _forget(self, key: bytes) -> None:
        with self._lock:
            self._unwritten.pop(key, None)
            self._query(lambda index: index.execute("DELETE FROM images WHERE key = ?", (key,)))

    def _query(self, query: Callable[[sqlite3.Connection], T]) -> T | None:
        """What the index answers; None where it is busy or cannot be written. A damaged one is replaced."""
        for is_last in (False, True):
            try:
                if self._index is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self._index = _connected(self._folder / _INDEX)
                return query(self._index)
            except (sqlite3.Error, OSError) as error:
                set_aside(error, f"{FOLDER}/{_INDEX}", "resized photos are")
                if self._index is not None:
                    with contextlib.suppress(sqlite3.Error):
                        self._index.close()
                    self._index = None
                if is_last or isinstance(error, (sqlite3.OperationalError, OSError)):
                    return None
        return None

    def _say(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._troubles.append(what)
            logger.warning("%s", what)


def _connected(path: Path) -> sqlite3.Connection:
    index = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    # A loss of power costs images that are made again: checksums tell which.
    index.execute("PRAGMA synchronous = OFF")
    index.executescript(_SCHEMA)
    return index


def _checksum(key: bytes, data: bytes) -> int:
    """Of the key, too: an index that is damaged may name the place of another image."""
    return zlib.crc32(data, zlib.crc32(key))
