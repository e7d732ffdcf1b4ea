"""A store in a folder of this machine."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator import disk
from orchestrator.errors import UserError
from orchestrator.fsio import NotAFileError, link_or_copy, make_folder, move, open_regular, replacing
from orchestrator.storage.scratch import Scratch
from orchestrator.storage.store import SCRATCH, Stat, parts_of, usable

_COPIED = 2**20
_log = logging.getLogger(__name__)


class LocalStore:
    """Objects as files below a folder.

    Links directly below the folder, such as `artifacts` on another disk, are its owner's and are followed. No other
    link is: it is not an object, is listed so that it can be deleted, and what is deleted is the link.

    Args:
        root: made if it is missing. What dead processes left unfinished in it is removed.

    Raises:
        UserError: the folder cannot be made or written.
    """

    remote = False

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        hint = "set `store` to a folder that can be written"
        disk.make_folder(self.root, hint, f"the store {self.root} cannot be created")
        if not os.access(self.root, os.W_OK):
            raise UserError(
                f"the store {self.root} cannot be written",
                where=str(self.root),
                hint=hint,
            )
        self.uri = str(self.root)
        self._scratch = Scratch(self.root / SCRATCH)

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path]]:
        # The scratch lock belongs to one process: a copy elsewhere opens the folder anew.
        return LocalStore, (self.root,)

    def put_bytes(self, name: str, data: bytes) -> None:
        """See :class:`Store`."""
        target = self._target(name)
        temporary = self.scratch("put")
        try:
            temporary.write_bytes(data)
            _commit(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def put_file(self, name: str, source: Path, *, consume: bool = False) -> None:
        """See :class:`Store`."""
        target = self._target(name)
        if consume and source.stat().st_dev == self.root.stat().st_dev and not source.is_symlink():
            _commit(source, target)
            return
        temporary = self.scratch("put")
        try:
            shutil.copyfile(source, temporary)
            _commit(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        if consume:
            source.unlink()

    def get_bytes(self, name: str) -> bytes:
        """See :class:`Store`."""
        with _absent_is_absent(), open_regular(self._path(name), follow=False) as file:
            return file.read()

    def get_file(self, name: str, target: Path) -> None:
        """See :class:`Store`."""
        source = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A copy: who reads it compares it with what it should be, or fetches it again.
        with (
            replacing(target, durable=False) as draft,
            _absent_is_absent(),
            open_regular(source, follow=False) as file,
            draft.open("wb") as copy,
        ):
            shutil.copyfileobj(file, copy, _COPIED)

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """See :class:`~orchestrator.storage.store.HasRanges`."""
        with _absent_is_absent(), open_regular(self._path(name), follow=False) as file:
            file.seek(start)
            return file.read(stop - start)

    def copy(self, source: str, target: str) -> None:
        """See :class:`Store`. Objects are replaced and never written to, so that one file may have both names."""
        path, final, temporary = self._path(source), self._target(target), self.scratch("copy")
        try:
            with _absent_is_absent(), open_regular(path, follow=False):
                link_or_copy(path, temporary)
            _commit(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Store`."""
        folder, _, _ = prefix.rpartition("/")
        top = self._folder(folder) if folder else self.root
        names: list[str] = []
        for parent, folders, files in os.walk(top, onerror=_refuse_unless_absent):
            if Path(parent) != self.root:
                files += [one for one in folders if (Path(parent) / one).is_symlink()]
            elif SCRATCH in folders:
                folders.remove(SCRATCH)
            names += [(Path(parent) / file).relative_to(self.root).as_posix() for file in files]
        return iter(usable([name for name in names if name.startswith(prefix)], self.uri))

    def delete(self, name: str) -> None:
        """See :class:`Store`. A link among the folders above the object is removed instead: there is no object."""
        parts = parts_of(name)
        link = self._link_among(parts[:-1])
        if link is not None:
            _log.warning("%s is a link in a store and is removed; what it leads to stays", link)
        (link or self.root.joinpath(*parts)).unlink(missing_ok=True)

    def stat(self, name: str) -> Stat | None:
        """See :class:`Store`."""
        try:
            status = self._path(name).lstat()
        except (FileNotFoundError, NotADirectoryError, NotAFileError):
            return None
        return Stat(status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None

    def local(self, prefix: str) -> Path:
        """See :class:`Store`."""
        return self._path(prefix.rstrip("/"))

    def scratch(self, label: str) -> Path:
        """See :class:`Store`."""
        return self._scratch.new(label)

    def _path(self, name: str) -> Path:
        """The object's file, which may be missing.

        Raises:
            NotAFileError: it would be below a link.
        """
        parts = parts_of(name)
        link = self._link_among(parts[:-1])
        if link is not None:
            raise NotAFileError(errno.EINVAL, f"not in a folder: {link} is a link", str(link))
        return self.root.joinpath(*parts)

    def _target(self, name: str) -> Path:
        """As `_path`, to be written.

        Raises:
            UserError: it would be below a link.
        """
        parts = parts_of(name)
        self._require_folders(parts[:-1])
        return self.root.joinpath(*parts)

    def _folder(self, name: str) -> Path:
        parts = parts_of(name)
        self._require_folders(parts)
        return self.root.joinpath(*parts)

    def _require_folders(self, parts: Sequence[str]) -> None:
        link = self._link_among(parts)
        if link is not None:
            raise not_followed(link)

    def _link_among(self, parts: Sequence[str]) -> Path | None:
        """The first of these folders, each below the one before it, that is a link but not directly below the root."""
        path = self.root.joinpath(*parts[:1])
        for part in parts[1:]:
            path /= part
            if path.is_symlink():
                return path
        return None


def not_followed(link: Path) -> UserError:
    """What to say of a link that is where a folder of a store should be."""
    return UserError(
        "a link is where a folder of the store should be, and links in a store are not followed",
        where=str(link),
        hint="remove the link, or move the folder that it leads to there",
    )


def _refuse_unless_absent(error: OSError) -> None:
    """What cannot be listed is not taken for empty: what is needed would count as not needed."""
    if not isinstance(error, FileNotFoundError):
        raise UserError(
            f"a folder of the store cannot be read: {error.strerror}",
            where=str(error.filename),
            hint="correct that, or move away what is there",
        )


@contextlib.contextmanager
def _absent_is_absent() -> Iterator[None]:
    """A folder is not an object, nor is anything below an object."""
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(error.errno, "no such object", error.filename) from None


def _commit(temporary: Path, target: Path) -> None:
    """Gives a finished file its name, so that it is there after a power cut too."""
    make_folder(target.parent)
    move(temporary, target)
