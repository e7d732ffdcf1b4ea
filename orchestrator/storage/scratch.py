"""Scratch folders that do not outlive the process that made them, however it dies.

A process holds a `flock` on `<id>.lock` beside its folder `<id>/`. The kernel drops the lock when the process
ends, also after SIGKILL, so whoever opens the scratch area next can tell dead folders from live ones.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
from pathlib import Path

_LOCK = re.compile(r"[0-9a-f]{32}\.lock")


class Scratch:
    """Scratch folders under `root`, one a process; those of dead processes are removed when it is opened."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pid: int | None = None
        self._folder: Path | None = None
        self._fd: int | None = None
        self.clean()

    def new(self, label: str) -> Path:
        """A path that exists neither as a file nor as a folder and that nobody else will be given."""
        return self._own_folder() / f"{label}-{uuid.uuid4().hex[:12]}"

    def clean(self) -> None:
        """Removes what dead processes left behind."""
        # Through a link, folders of others could be meant; so could names that are not given here.
        if self.root.is_symlink() or not self.root.is_dir():
            return
        for lock in self.root.glob("*.lock"):
            if not _LOCK.fullmatch(lock.name):
                continue
            fd = _try_lock(lock)
            if fd is None:
                continue
            try:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                # What could not be removed is found by its lock the next time.
                if not lock.with_suffix("").exists():
                    lock.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def _own_folder(self) -> Path:
        # A forked child shares the parent's lock but may outlive it: it gets a folder and a lock of its own.
        if self._folder is None or self._pid != os.getpid():
            self._folder = self._make_folder()
            self._pid = os.getpid()
        return self._folder

    def _make_folder(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        while True:
            lock = self.root / f"{uuid.uuid4().hex}.lock"
            lock.touch()
            self._fd = _try_lock(lock)
            # Between `touch` and the lock a cleaner may have taken the file for a dead process's: start over.
            if self._fd is not None:
                folder = lock.with_suffix("")
                folder.mkdir()
                return folder


def _try_lock(path: Path) -> int | None:
    """An open descriptor that holds the lock on `path`, or None if it is held or the file has gone."""
    try:
        fd = os.open(path, os.O_RDWR)
    except (FileNotFoundError, IsADirectoryError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None
