"""A disk that fails at the n-th thing that is written to it, under whatever code writes."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest

_CALLS = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "link")


class Crash(BaseException):
    """The machine went down: nothing that comes after it, such as cleaning up, happens."""


class Disk:
    """Counts writes, and fails at one of them.

    Args:
        fail_at: the number of the write that fails, from 1; 0 for none.
        crash: whether nothing can be written from then on, as after a power cut; otherwise it is full just once.

    Attributes:
        count: writes so far.
    """

    def __init__(self, fail_at: int = 0, *, crash: bool = False) -> None:
        self.fail_at, self.crash, self.count = fail_at, crash, 0

    @property
    def failed(self) -> bool:
        return 0 < self.fail_at <= self.count

    def point(self, half: Callable[[], object] = lambda: None) -> None:
        """A write is about to happen; of the one that fails `half` does happen."""
        self.count += 1
        if self.count == self.fail_at:
            half()
        if self.count == self.fail_at or (self.crash and self.failed):
            raise Crash if self.crash else OSError(errno.ENOSPC, "No space left on device")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it under everything that this process writes."""
        for name in _CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        real = io.open

        def open_(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            opened = real(file, mode, *args, **options)
            return _File(opened, self) if set(mode) & set("wax+") else opened

        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)

        def copyfile(source: Any, target: Any, **options: Any) -> Any:
            with real(source, "rb") as read, open_(target, "wb") as write:
                write.write(read.read())
            return target

        patch.setattr(shutil, "copyfile", copyfile)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.point()
            return call(*args, **options)

        return counted


class _File:
    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._disk.point(half)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
