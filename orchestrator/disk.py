"""Full disks: how they are told from other trouble, and the sentence that says which one, and how full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
# As the system, SQLite and Ray put it in errors that have lost their number on the way from another process.
_SAID = (
    "No space left on device",
    "Disk quota exceeded",
    "database or disk is full",
    "Out of disk",
    "OutOfDisk",
)
# SQLite says of a disk without room for its journal that it failed, not that it is full.
_SAID_PERHAPS = ("disk I/O error", "unable to open database file")
_NEARLY_FULL = 64 * 1024


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that brought it about, says that a disk or a quota is full."""
    return any(_says_full(one) for one in _chain(error))


def is_full_at(error: BaseException | None, folder: Path) -> bool:
    """As :func:`is_full`, and whether an error that does not say why comes from a folder without room."""
    if is_full(error):
        return True
    unsaid = any(text in str(one) for one in _chain(error) for text in _SAID_PERHAPS)
    return unsaid and space(folder)[0] < _NEARLY_FULL


def described(error: BaseException | None, folders: Iterable[Path]) -> str:
    """`the disk of /data/runs is full (0.0 of 40.0 MB free)`.

    Args:
        error: the file that it names tells the disk.
        folders: where the process writes. Without a file the fullest of these is meant.
    """
    named = next((path for one in _chain(error) if (path := _file_of(one)) is not None), None)
    folder = named if named is not None else min(folders, key=lambda one: space(one)[0])
    free, total = space(folder)
    return f"the disk of {folder} is full ({free / 1e6:,.1f} of {total / 1e6:,.1f} MB free)"


def space(path: Path) -> tuple[int, int]:
    """Bytes free and in all of the disk that a path is on, or will be."""
    while True:
        try:
            usage = shutil.disk_usage(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return usage.free, usage.total


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _SAID)


def _file_of(error: BaseException) -> Path | None:
    if not isinstance(error, OSError) or error.errno not in _FULL or not isinstance(error.filename, str):
        return None
    return Path(error.filename).absolute().parent


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
