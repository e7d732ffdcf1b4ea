"""A base for stores of users' packages: with it a store is five methods on bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from orchestrator.fsio import atomic_write
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.storage.scratch import Scratch
from orchestrator.storage.store import NO_COPY, SCRATCH, CannotCopyError, parts_of


class CachedStore:
    """Objects elsewhere; what is read of them as files lies in this machine's cache.

    A subclass defines `put_bytes`, `get_bytes`, `list`, `delete` and `stat` as :class:`orchestrator.Store` says, and
    calls :func:`checked_name` on each name. Objects go through memory whole; define `put_file` and `get_file`, too,
    where they do not fit. With `copy`, finished files become artifacts without passing through the driver. In another
    process the store is made from the address alone.

    Args:
        uri: its address, `scheme://…`, without secrets.
    """

    remote = True

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.root = cache_folder() / "stores" / hashlib.sha256(uri.encode()).hexdigest()[:16]
        self._scratch: Scratch | None = None

    def __reduce__(self) -> tuple[type[CachedStore], tuple[str]]:
        # Connections belong to one process.
        return type(self), (self.uri,)

    def put_bytes(self, name: str, data: bytes) -> None:
        """See :class:`Store`."""
        raise NotImplementedError

    def get_bytes(self, name: str) -> bytes:
        """See :class:`Store`."""
        raise NotImplementedError

    def put_file(self, name: str, source: Path, *, consume: bool = False) -> None:
        """See :class:`Store`."""
        self.put_bytes(name, source.read_bytes())
        if consume:
            source.unlink()

    def get_file(self, name: str, target: Path) -> None:
        """See :class:`Store`."""
        data = self.get_bytes(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # What is lost of a copy is fetched again.
        atomic_write(target, data, durable=False)

    def copy(self, source: str, target: str) -> None:
        """See :class:`Store`."""
        raise CannotCopyError(NO_COPY)

    def local(self, prefix: str) -> Path:
        """See :class:`Store`: in the cache, which the engine fills."""
        return self.root.joinpath(*parts_of(prefix.rstrip("/")))

    def scratch(self, label: str) -> Path:
        """See :class:`Store`: in the cache."""
        if self._scratch is None:
            self._scratch = Scratch(self.root / SCRATCH)
        return self._scratch.new(label)


def checked_name(name: str) -> str:
    """The name of an object, if it is one.

    Raises:
        BadNameError: it leads out of the store, or no file can have it.
    """
    return "/".join(parts_of(name))
