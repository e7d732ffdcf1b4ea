"""Files and folders that appear whole, and hashes of files: the one way to write them and the one way to read them.

Whoever reads, at any moment and after a power cut, finds the old content or the new one, and nothing in between. What
is not finished has a hidden name in the same folder, `.<name>.partial…`, which no listing takes for a real file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import os
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from orchestrator.byte_counts import BYTES

# Of a name; what is added to a longer one could exceed the 255 bytes that file systems allow.
_SHOWN = 40
_NO_LINK = (errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
# Device, inode, size and time of last change in nanoseconds: a renamed file is still the same file.
_Identity = tuple[int, int, int, int]
# A file system's clock may tick this slowly: a file changed later than that may change again and look the same.
_TICK_NS = 20_000_000
_PIECE = 1 << 20
# A folder in the making is in use for less than that.
_LEFT_BEHIND_S = 86_400.0


# --- writing ----------------------------------------------------------------------------------------------------


def atomic_write(path: Path, data: bytes | str, *, durable: bool = True, only_writer: bool = False) -> None:
    """Write a file as a whole. Its folder has to be there, as for all functions here.

    Args:
        path: what is there is replaced.
        data: text becomes UTF-8.
        durable, only_writer: see :func:`replacing`.

    Raises:
        OSError: it cannot be written. What was there is still there, and nothing else is left.
    """
    with replacing(path, durable=durable, only_writer=only_writer) as draft:
        draft.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, only_writer: bool = False) -> Iterator[Path]:
    """Write a file by other means: the block writes the path that it is given, which then becomes `path`.

    Nothing happens to `path` if the block raises.

    Args:
        durable: wait until the disk has it, so that it is there after a power cut. Without it a power cut may leave
            the old file, the new one or an empty one.
        only_writer: nobody else writes `path` meanwhile. The unfinished file then always has the same name, so the
            next write replaces what a killed process left.
    """
    draft = _draft(path, only_writer)
    try:
        yield draft
        move(draft, path, durable=durable)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def atomic_create(path: Path, data: bytes) -> bool:
    """Write a file durably unless there is one; False if there is, or if the file system has no hard links."""
    draft = _draft(path)
    try:
        draft.write_bytes(data)
        return link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def move(source: Path, target: Path, *, durable: bool = True) -> None:
    """Give a finished file or folder its name, on the same file system. A file that has the name is replaced.

    Args:
        source: with all that is in it.
        durable: see :func:`replacing`.
    """
    if durable:
        sync(source)
    source.replace(target)
    if durable:
        sync_folder(target.parent)


def link(source: Path, target: Path) -> bool:
    """Give a finished file a second name, durably, unless something has that name.

    Returns:
        False if something has it, or if the file system has no hard links.
    """
    sync(source)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    sync_folder(target.parent)
    return True


def link_or_copy(source: Path, target: Path) -> Path:
    """Give a finished file that nobody changes any more another name, or copy it where there are no links.

    A file that has the name is replaced; one that is the very same file stays. It is no more durable than the file is.
    """
    with contextlib.suppress(FileNotFoundError):
        # Not of what a link at `target` leads to: the link alone goes.
        if os.path.samestat(source.stat(), target.lstat()):
            return target
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links, or too many of them
        shutil.copyfile(source, target)
    return target


def link_tree(source: Path, target: Path) -> None:
    """As :func:`link_or_copy`, of all files of a folder; makes `target`, which must not be there."""
    shutil.copytree(source, target, copy_function=lambda one, other: link_or_copy(Path(one), Path(other)))


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder to make `path` in, which :func:`move` then names. It goes at the end with what is left in it.

    Those that killed processes left behind go, too, once they are a day old: a new one may not be locked yet, and some
    network file systems lock for one machine only, or not at all.
    """
    prefix = f".{path.name[:_SHOWN]}.partial-"
    for other in path.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > _LEFT_BEHIND_S:
                with _locked(other):
                    shutil.rmtree(other, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        name = stack.enter_context(
            tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True)
        )
        with contextlib.suppress(OSError):
            stack.enter_context(_locked(Path(name)))
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Have the lock of a folder, which goes with this process and its forks. Raises OSError if another has it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that it is there after a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder with all that is in it."""
    if not path.is_dir():
        _sync(path)
        return
    for parent, _, files in os.walk(path):
        for file in files:
            if not (Path(parent) / file).is_symlink():
                _sync(Path(parent) / file)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    try:
        _sync(folder)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if error.errno != errno.EINVAL:
            raise


def _draft(path: Path, only_writer: bool = False) -> Path:
    if only_writer:
        return path.with_name(f".{path.name}.partial")
    return path.with_name(f".{path.name[:_SHOWN]}.partial-{uuid.uuid4().hex[:12]}")


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- reading ----------------------------------------------------------------------------------------------------


class NotAFileError(OSError, ValueError):
    """Something has the name that is not a regular file: a pipe, a device, or a link where none belongs.

    It is a ValueError too: what should be a record is damaged.
    """

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path | str, *, follow: bool = True) -> io.BufferedReader:
    """A regular file, open for reading bytes. Never waits for the writer of a pipe.

    Args:
        path: of the file.
        follow: whether it may be a link to one.

    Raises:
        NotAFileError: it is something else.
        OSError: it cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except OSError as error:
        # A socket cannot be opened, nor can a pipe's like without its other end.
        if error.errno == errno.ENXIO or (error.errno == errno.ELOOP and not follow):
            raise NotAFileError(errno.EINVAL, "not a regular file", str(path)) from None
        raise
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise NotAFileError(errno.EINVAL, "not a regular file", str(path))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


# --- hashing ----------------------------------------------------------------------------------------------------


def sha256_of(file: Path | io.BufferedReader) -> str:
    """The sha256 of a file's content in hex. Files of any size: they are read in pieces.

    Args:
        file: its path, or the file itself, open for reading bytes.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(file, Path):
        with open_regular(file) as opened:
            return sha256_of(opened)
    return hashlib.file_digest(file, "sha256").hexdigest()


def pieces_of(file: io.BufferedReader, most: int) -> Iterator[bytes]:
    """What is in a file of which nothing was read yet, in pieces of at most 1 MiB.

    Args:
        file: open for reading bytes.
        most: bytes that it may have, whatever its size was said to be: some files grow, and some have no end.

    Raises:
        OSError: it cannot be read, or it has more bytes.
    """
    while piece := os.read(file.fileno(), _PIECE):
        most -= len(piece)
        if most < 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(file.name))
        yield piece


class Digests:
    """The sha256 of files of artifacts, each read once as long as it does not change. Safe to use from several threads.

    Attributes:
        bytes_read: all that had to be read.
    """

    def __init__(self) -> None:
        self.bytes_read = 0
        self._known: dict[_Identity, str] = {}
        self._lock = threading.Lock()

    def of(self, path: Path) -> str:
        """The sha256 of the file in hex.

        Raises:
            OSError: it cannot be read.
        """
        with open_regular(path) as file:
            began = time.time_ns()
            before = _identity(file.fileno())
            known = self._known.get(before)
            if known is not None:
                return known
            digest = sha256_of(file)
            after = _identity(file.fileno())
        BYTES.read("artifact", after[2])
        with self._lock:
            self.bytes_read += after[2]
            if before == after and after[3] < began - _TICK_NS:
                self._known[after] = digest
        return digest

    def note(self, path: Path, sha256: str) -> None:
        """Take a known sha256 of a file from the process that wrote it: while the file does not change, it is not read.

        Raises:
            OSError: it is not there.
        """
        with open_regular(path) as file, self._lock:
            self._known[_identity(file.fileno())] = sha256


def _identity(fd: int) -> _Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


DIGESTS = Digests()


def why(error: OSError) -> str:
    """The reason of an OSError, without the path."""
    return error.strerror or str(error)
