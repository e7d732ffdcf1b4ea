"""Where objects live: the interface of every store, and what names there may be in one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from orchestrator import names as stored
from orchestrator.names import BadNameError

SCRATCH = ".scratch"
NO_COPY = "it has no `copy`"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stat:
    """Size in bytes and time of last change in seconds since 1970."""

    size: int
    modified: float


class CannotCopyError(OSError):
    """A store does not copy objects: it knows no way to, or refuses."""


class Store(Protocol):
    """Objects by name. Names are relative POSIX paths, see :func:`orchestrator.names.parts_of`.

    A put is atomic: readers see the whole old object or the whole new one, also after a crash. Nothing is
    promised about several objects together: a group exists when the one that lists it, written last, does.

    Attributes:
        uri: opens the same store in another process.
        remote: the objects are elsewhere, and `local` and `root` are a cache.
        root: the store's folder on this machine, the same on all machines with the same settings.
    """

    @property
    def uri(self) -> str: ...

    @property
    def remote(self) -> bool: ...

    @property
    def root(self) -> Path: ...

    def put_bytes(self, name: str, data: bytes) -> None:
        """Writes `data` as `name`, replacing what was there."""

    def put_file(self, name: str, source: Path, *, consume: bool = False) -> None:
        """Writes the file `source` as `name`. With `consume` the source is gone afterwards (cheaper)."""

    def get_bytes(self, name: str) -> bytes:
        """The object's content. FileNotFoundError if there is none, NotAFileError if something else has its name."""

    def get_file(self, name: str, target: Path) -> None:
        """Writes the object to `target`, atomically; makes its folder. FileNotFoundError if there is none."""

    def copy(self, source: str, target: str) -> None:
        """Writes the object `source` as `target`, too, within the store: its content does not pass through here.

        Raises:
            CannotCopyError: the store does not copy objects.
            FileNotFoundError: there is no such object.
        """

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that start with `prefix`, sorted. Names that no store gives are left out, with a warning."""

    def delete(self, name: str) -> None:
        """Removes the object; fine if there is none."""

    def stat(self, name: str) -> Stat | None:
        """Size and time, or None if there is no such object."""

    def local(self, prefix: str) -> Path:
        """The folder on this machine for the objects below `prefix`, to be read only.

        Of a remote store it holds what was fetched, see :meth:`ArtifactStore.fetch`.
        """

    def scratch(self, label: str) -> Path:
        """A path for work in progress that does not exist yet; gone once this process is."""


@runtime_checkable
class HasRanges(Protocol):
    """What a store has, too, that gives parts of objects: then workers read their slices of a checkpoint in it."""

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object, fewer where it ends before. FileNotFoundError if there is none."""

    def stat(self, name: str) -> Stat | None:
        """See :meth:`Store.stat`."""


def copy_within(store: Store, source: str, target: str) -> None:
    """As `Store.copy`, of any store: those of users' packages may lack it.

    Raises:
        CannotCopyError, FileNotFoundError: see :meth:`Store.copy`.
    """
    if not hasattr(store, "copy"):
        raise CannotCopyError(NO_COPY)
    store.copy(source, target)


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of an object's name.

    Raises:
        BadNameError: it is none, see :func:`orchestrator.names.parts_of`, or among the scratch folders.
    """
    parts = stored.parts_of(name)
    if parts[0] == SCRATCH:
        raise BadNameError(name, "is among the scratch folders")
    return parts


def usable(names: list[str], uri: str) -> list[str]:
    """The names that are objects', sorted; of the others one line says how many were passed over in `uri`."""
    bad = [name for name in names if not stored.is_name(name)]
    if bad:
        _log.warning(
            "%d objects in %s have invalid names and are skipped, such as %.80r",
            len(bad),
            uri,
            min(bad),
        )
    return sorted(set(names) - set(bad))
