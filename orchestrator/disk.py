"""Paths that a user gave and folders that are made for them, and full disks: how those are told from other trouble."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from orchestrator.errors import UserError, causes, shortened
from orchestrator.fsio import folder_beside, why
from orchestrator.redact import redacted

_FULL = (errno.ENOSPC, errno.EDQUOT)
_QUOTA = "Disk quota exceeded"
# As the system, SQLite and Ray put it in errors that have lost their number on the way from another process.
_SAID = (
    "No space left on device",
    _QUOTA,
    "database or disk is full",
    "Out of disk",
    "OutOfDisk",
)
# SQLite says of a disk without room for its journal that it failed, not that it is full.
_SAID_PERHAPS = ("disk I/O error", "unable to open database file")
# Bytes free below which a disk is called full: whoever was refused may have removed its draft since.
NEARLY_FULL = 2**20
LEFT_FREE = 0.05
"""The share of a disk that caches leave free, for checkpoints and others."""


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that brought it about, says that a disk or a quota is full."""
    return any(_says_full(one) for one in causes(error))


def is_full_at(error: BaseException | None, folder: Path) -> bool:
    """As :func:`is_full`, and whether an error that does not say why comes from a folder without room."""
    if is_full(error):
        return True
    unsaid = any(text in str(one) for one in causes(error) for text in _SAID_PERHAPS)
    return unsaid and space(folder)[0] < NEARLY_FULL


def described(error: BaseException, folders: Iterable[Path] = ()) -> str:
    """`the disk of /data/runs is full (0.0 of 40.0 MB free)`, if that can be seen; else what the error says.

    It cannot be seen where a quota is full, or the disk of another machine, or one that has no more inodes.

    Args:
        error: says that a disk is full; the file that it names tells which.
        folders: where the process writes. Without a file the fullest of these is looked at.
    """
    full = [one for one in causes(error) if _says_full(one)]
    told = next((one for one in full if file_of(one) is not None), next(iter(full), error))
    if _is_quota(told):
        return f"a disk quota is used up: {_sentence(told)}"
    file = file_of(told) if full else None
    looked = [file.parent] if file is not None else list(folders)
    folder = min(looked, key=lambda one: space(one)[0], default=None)
    if folder is None or space(folder)[0] >= NEARLY_FULL:
        return f"a disk or a quota is full: {_sentence(told)}"
    return f"the disk of {folder} is full ({room(folder)})"


def room(folder: Path, needed: int | None = None) -> str:
    """`0.0 of 40.0 MB free`, of the disk of a folder; and how many of `needed` bytes there should be."""
    free, total = space(folder)
    found = f"{free / 1e6:,.1f} of {total / 1e6:,.1f} MB free"
    return found if needed is None else f"{found}, {needed / 1e6:,.1f} MB needed"


def space(path: Path) -> tuple[int, int]:
    """Bytes free and in all of the disk that a path is on, or will be."""
    usage = shutil.disk_usage(existing(path))
    return usage.free, usage.total


def existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def temporary() -> Path:
    """The folder for files that do not stay. Unlike `tempfile.gettempdir` it is not tried, which needs room."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def file_of(error: BaseException) -> Path | None:
    """The file that an error of the system names; of a copy, the one that was to be written."""
    names = (error.filename2, error.filename) if isinstance(error, OSError) else ()
    name = next((name for name in names if isinstance(name, str | os.PathLike)), None)
    return None if name is None else Path(name).absolute()


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _SAID)


def _is_quota(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno == errno.EDQUOT) or _QUOTA in str(error)


def _sentence(error: BaseException) -> str:
    """What an error says, on one line: of several that which speaks of the disk."""
    file = file_of(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if file is None else f"{error.strerror}: {file}"
    else:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = (line for line in lines if any(words in line for words in _SAID))
        text = next(said, next(iter(lines), type(error).__name__))
    return shortened(redacted(text))


def named(text: Path | str) -> Path:
    """A path that a user gave, with `~` replaced.

    Raises:
        UserError: no file can have the name, or there is no such user.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise UserError(
            f"the path cannot be used: {reason}", where=str(text), hint="check the path"
        ) from None
    return path


def make_folder(folder: Path, hint: str, what: str | None = None) -> None:
    """Make a folder, and those above it, that a setting or an option names.

    Args:
        hint: how to name another one.
        what: cannot be done if the folder cannot be made.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{what or f'the folder {folder} cannot be made'}: {why(error)}"
        raise UserError(said, where=str(folder), hint=hint) from error


@contextlib.contextmanager
def making(out: Path, hint: str = "name another folder for --out") -> Iterator[Path]:
    """An empty folder beside `out` to make it in: see :func:`orchestrator.fsio.folder_beside`.

    Raises:
        UserError: nothing can be made there; `hint` says how to name another place.
    """
    make_folder(out.parent, hint)
    with contextlib.ExitStack() as stack:
        try:
            draft = stack.enter_context(folder_beside(out))
        except OSError as error:
            what = f"the folder {out} cannot be made: {why(error)}"
            raise UserError(what, where=str(out), hint=hint) from error
        yield draft
