"""Digests of files that were read once are remembered: what has not changed is not read again to know what it is.

A file is known by its path, size, and times of modification and of change of its inode. As git does, an entry is not
trusted if the file was changed so shortly before it was hashed that a later change could have left the same times: it
is hashed once more, and then trusted. What is remembered is a help and never needed: without a cache folder that can
be written, with a damaged database, or beside a writer that takes long, files are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from orchestrator.fsio import open_regular, pieces_of
from orchestrator.storage.cache_database import cache_database, set_aside

FILE = "digests.sqlite3"
# File systems keep times in steps of up to two seconds (FAT), and the kernel's own in steps of some milliseconds.
_RACY_NS = 2 * 10**9
# A writer of another process is waited for so long, in seconds.
_BUSY_S = 2.0
# Rows of one folder beyond those of its files, before the ones of files that are gone are removed.
_SPARE = 1000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    root TEXT NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL,
    hashed INTEGER NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (root, path)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    path TEXT NOT NULL PRIMARY KEY, size INTEGER NOT NULL, mtime INTEGER NOT NULL, ctime INTEGER NOT NULL,
    listed INTEGER NOT NULL, members TEXT NOT NULL
) WITHOUT ROWID;
"""


class FileStamp(NamedTuple):
    """What tells whether a file changed, without reading it: its size, and its times in nanoseconds."""

    size: int
    mtime: int
    ctime: int

    @property
    def fits(self) -> bool:
        """Whether a database can hold it: nanoseconds in 64 bits end in the year 2262, file systems later."""
        return max(map(abs, self)) < 2**63


class _Entry(NamedTuple):
    """What was remembered: when hashing began, and what came out (32 bytes)."""

    stamp: FileStamp
    hashed: int
    digest: bytes

    def holds(self, stamp: FileStamp) -> bool:
        """Whether a file with this stamp has this digest."""
        return self.stamp == stamp and is_settled(stamp, self.hashed)

    @property
    def can_be_kept(self) -> bool:
        """Whether the file did not change while it was read, and has times that a database can hold."""
        return self.stamp.size >= 0 and self.stamp.fits


def is_settled(stamp: FileStamp, read: int) -> bool:
    """Whether a file with this stamp was old enough when it was read, for a later change to show in its times."""
    return max(stamp.mtime, stamp.ctime) + _RACY_NS < read


Each = Callable[[Callable[[int], "_Entry | None"], Sequence[int]], "list[_Entry | None]"]


def digests(
    root: Path,
    files: Sequence[str],
    most: int,
    stop: threading.Event,
    side_by_side: Each,
    stamps: Sequence[FileStamp | None] = (),
) -> list[str | None]:
    """The sha256 of each file; None of one that cannot be read, or has more than `most` bytes.

    Args:
        root: the folder.
        files: paths from it.
        most: bytes that are read of a file.
        stop: set when nobody waits for the answer any more.
        side_by_side: calls something for many numbers of files, by several threads.
        stamps: the stamp of each file, where that was just asked; else it is asked.

    Returns:
        64 hex digits each, in the order of `files`.
    """
    place = str(root.resolve())
    known = _load(place)
    stamps = stamps or [_stamp(root / file) for file in files]
    found: list[bytes | None] = [None] * len(files)
    unknown = []
    for number, (file, stamp) in enumerate(zip(files, stamps, strict=True)):
        entry = known.get(file)
        if stamp is not None and stamp.size > most:
            continue
        if stamp is not None and entry is not None and entry.holds(stamp):
            found[number] = entry.digest
        else:
            unknown.append(number)

    read = side_by_side(lambda number: _hash(root / files[number], most, stop), unknown)
    fresh = {number: entry for number, entry in zip(unknown, read, strict=True) if entry is not None}
    for number, entry in fresh.items():
        found[number] = entry.digest
    if not stop.is_set():
        gone = set(known).difference(files) if len(known) > 2 * len(files) + _SPARE else set()
        _save(place, {files[number]: entry for number, entry in fresh.items() if entry.can_be_kept}, gone)
    return [digest.hex() if digest is not None else None for digest in found]


def trusted(place: str, files: Sequence[str], stamps: Sequence[FileStamp | None]) -> dict[str, str]:
    """The sha256 of files that have not changed since it was remembered under this place, by path; nothing is read."""
    known = _load(place)
    pairs = ((file, stamp, known.get(file)) for file, stamp in zip(files, stamps, strict=True))
    return {
        file: entry.digest.hex() for file, stamp, entry in pairs if stamp and entry and entry.holds(stamp)
    }


def note(place: str, found: Mapping[str, tuple[FileStamp, int, str]]) -> None:
    """Remember digests under a place: the stamp of a file, when it began to be read, and its sha256."""
    entries = {
        path: _Entry(stamp, began, bytes.fromhex(digest)) for path, (stamp, began, digest) in found.items()
    }
    _save(place, {path: entry for path, entry in entries.items() if entry.can_be_kept}, set())


def digest_of(path: Path, most: int, stop: threading.Event) -> str | None:
    """The sha256 of one file, read now; None as in :func:`digests`."""
    entry = _hash(path, most, stop)
    return None if entry is None else entry.digest.hex()


def _stamp(path: Path) -> FileStamp | None:
    try:
        return stamp_of(path.stat())
    except OSError:
        return None


def stamp_of(status: os.stat_result) -> FileStamp:
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _hash(path: Path, most: int, stop: threading.Event) -> _Entry | None:
    """Read a file. One that changes meanwhile has a size of -1 in its stamp: it is not to be remembered."""
    whole = hashlib.sha256()
    began = time.time_ns()
    try:
        with open_regular(path) as file:
            before = _status(file)
            for piece in pieces_of(file, most):
                if stop.is_set():
                    return None
                whole.update(piece)
            after = _status(file)
    except OSError:
        return None
    stamp = before if before == after else before._replace(size=-1)
    return _Entry(stamp, began, whole.digest())


def _status(file: io.BufferedReader) -> FileStamp:
    return stamp_of(os.fstat(file.fileno()))


# --- what is remembered ---------------------------------------------------------------------------------------------


def remembered() -> contextlib.AbstractContextManager[sqlite3.Connection]:
    """The database of digests and of what shards hold; see :func:`cache_database`."""
    return cache_database(FILE, _SCHEMA, _BUSY_S)


def forget(error: Exception) -> None:
    """See :func:`orchestrator.storage.cache_database.set_aside`."""
    set_aside(error, FILE, "digests of files are")


def _load(root: str) -> dict[str, _Entry]:
    try:
        with remembered() as connection:
            rows = connection.execute(
                "SELECT path, size, mtime, ctime, hashed, digest FROM files WHERE root = ?", (root,)
            ).fetchall()
    except (sqlite3.Error, OSError) as error:
        forget(error)
        return {}
    return {
        path: _Entry(FileStamp(size, mtime, ctime), hashed, digest)
        for path, size, mtime, ctime, hashed, digest in rows
        if isinstance(digest, bytes) and len(digest) == 32
    }


def _save(root: str, fresh: dict[str, _Entry], gone: set[str]) -> None:
    if not fresh and not gone:
        return
    rows = [(root, path, *entry.stamp, entry.hashed, entry.digest) for path, entry in fresh.items()]
    try:
        with remembered() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            connection.executemany(
                "DELETE FROM files WHERE root = ? AND path = ?", [(root, path) for path in gone]
            )
            connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        forget(error)
