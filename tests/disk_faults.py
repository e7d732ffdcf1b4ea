"""A disk that fails at the n-th thing that is written to it, under whatever code of this process writes.

It stands under Python's own calls, and under the few libraries that write files past them: safetensors and Arrow.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

# `once`: the disk is full at one moment. `full`: from then on things can only be removed. `crash`: power is lost.
Kind = Literal["once", "full", "crash"]
KINDS: tuple[Kind, ...] = ("once", "full", "crash")
_REMOVE = ("unlink", "rmdir", "remove")
_CALLS = ("replace", "rename", "mkdir", "fsync", "link", "symlink", "ftruncate", *_REMOVE)
_TO_WRITE = os.O_WRONLY | os.O_RDWR


class Crash(BaseException):
    """The machine went down: nothing that comes after it, such as cleaning up, happens."""


class Disk:
    """Counts writes, and fails at one of them.

    Args:
        fail_at: the number of the write that fails, from 1; 0 for none.
        kind: what happens then.

    Attributes:
        count: writes so far.
    """

    def __init__(self, fail_at: int = 0, kind: Kind = "once") -> None:
        self.fail_at, self.kind, self.count = fail_at, kind, 0

    @property
    def failed(self) -> bool:
        return 0 < self.fail_at <= self.count

    def point(self, half: Callable[[], object] = lambda: None, *, removes: bool = False) -> None:
        """A write is about to happen; of the one that fails `half` does happen."""
        self.count += 1
        if not self.failed or (self.kind == "full" and removes):
            return
        if self.count == self.fail_at:
            half()
        elif self.kind == "once":
            return
        raise Crash if self.kind == "crash" else OSError(errno.ENOSPC, "No space left on device")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it under everything that this process writes."""
        for name in _CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name), removes=name in _REMOVE))
        # No power is lost here, and disks of busy machines take long for it.
        patch.setattr(os, "fsync", self._counted(lambda fd: None, removes=False))
        real_open, real_os_open, real_write = io.open, os.open, os.write

        def open_(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **options)
            self.point()
            return _File(real_open(file, mode, *args, **options), self)

        def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                self.point()
            return real_os_open(path, flags, *args, **options)

        def os_write(fd: int, data: Any) -> int:
            self.point(lambda: real_write(fd, bytes(data)[: len(data) // 2]))
            return real_write(fd, data)

        def copyfile(source: Any, target: Any, **options: Any) -> Any:
            with real_open(source, "rb") as read, open_(target, "wb") as write:
                write.write(read.read())
            return target

        patch.setattr(io, "open", open_)
        patch.setattr(builtins, "open", open_)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "write", os_write)
        patch.setattr(shutil, "copyfile", copyfile)
        self._under_libraries(patch)

    def _under_libraries(self, patch: pytest.MonkeyPatch) -> None:
        import pyarrow.parquet as parquet
        import safetensors.numpy
        import safetensors.torch

        def written_by(call: Callable[..., Any], path_at: int) -> Callable[..., Any]:
            def write(*args: Any, **options: Any) -> Any:
                path = Path(args[path_at])

                def half() -> None:
                    call(*args, **options)
                    os.truncate(path, path.stat().st_size // 2)

                self.point(half)
                return call(*args, **options)

            return write

        patch.setattr(parquet, "write_table", written_by(parquet.write_table, 1))
        for module in (safetensors.numpy, safetensors.torch):
            patch.setattr(module, "save_file", written_by(module.save_file, 1))

    def _counted(self, call: Callable[..., Any], *, removes: bool) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self.point(removes=removes)
            return call(*args, **options)

        return counted


def every_fault(kind: Kind, at_least: int) -> Iterator[Disk]:
    """Disks that fail at the first write, the second, and so on, until one gets through without.

    Args:
        kind: of fault.
        at_least: writes that the operation has; with fewer the faults were not where it writes.
    """
    number = 0
    while True:
        number += 1
        disk = Disk(number, kind)
        yield disk
        if not disk.failed:
            break
    assert disk.count >= at_least, f"{disk.count} writes only"


def goes_through(disk: Disk, operation: Callable[[], object]) -> bool:
    """Do something on the disk; whether it got through. Errors that are none of a disk's pass through."""
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        try:
            operation()
        except Crash:
            return False
        except Exception as error:
            if not disk.failed or not _is_the_disks(error):
                raise
            return False
    return True


def _is_the_disks(error: BaseException | None) -> bool:
    """Whether a full disk is what it says, or what it comes from."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


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

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
