"""From a store's address to the store, and from an artifact's name to its folder on this machine."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from orchestrator import installed
from orchestrator.errors import UserError, nearest, shortened
from orchestrator.installed import ExtensionError
from orchestrator.storage.artifacts import ArtifactStore, folder_name
from orchestrator.storage.local import LocalStore
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.s3_client import Patience
from orchestrator.storage.store import Store

# What a store of a user's package has: see :class:`orchestrator.storage.store.Store`.
_METHODS = ("put_bytes", "put_file", "get_bytes", "get_file", "list", "delete", "stat", "local", "scratch")


def is_remote(uri: str) -> bool:
    """Whether the store at `uri` is anything but a folder."""
    return "://" in uri and not uri.startswith("file://")


def folder_of(uri: str) -> Path:
    """The folder of a store that is one, as an absolute path; it may be missing.

    Raises:
        UserError: the address is empty, or means no folder that there can be.
    """
    written = uri.removeprefix("file://")
    try:
        if not written.strip():
            raise UserError(
                "the address of the store is empty",
                where="store",
                hint="set `store` to a folder, such as runs/",
            )
        folder = Path(written).expanduser().absolute()
        folder.exists()  # a name that is too long shows here
    except (OSError, RuntimeError, ValueError) as error:
        # Of an unknown home folder, a name that is too long, and a working folder that was deleted.
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"the store {shortened(uri, 80)} cannot be used: {why}",
            where="store",
            hint="set `store` to a folder that can be made, such as runs/",
        ) from None
    return folder


def can_be_opened(uri: str) -> bool:
    """Whether the store at `uri` is elsewhere, and of a kind that there is."""
    return is_remote(uri) and uri.partition("://")[0] in ("s3", *installed.names("stores"))


def open_store(uri: str, patience: Patience | None = None) -> Store:
    """The store at `uri`: a folder, `file://` and an absolute path, `s3://bucket/prefix`, or an installed package's.

    A folder is made if it is missing. S3 is not connected to: its first use is.

    Args:
        uri: its address.
        patience: how long to put up with the server of S3.

    Raises:
        UserError: no package has the scheme, its store does not fit, or the folder cannot be written.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator or scheme == "file":
        return LocalStore(folder_of(uri))
    if scheme == "s3":
        return S3Store(uri, patience)
    return _opened(scheme, uri)


def _opened(scheme: str, uri: str) -> Store:
    """The store of a user's package: what its entry point, called with the address, gives."""
    # Addresses are in records, too: a scheme is never taken for an import path.
    names = installed.names("stores")
    if scheme not in names:
        close = nearest(scheme, (*installed.STORES, *names))
        brought = "".join(f", or to {name}://…" for name in names)
        raise UserError(
            f"a store of kind {shortened(scheme, 80)}:// is not supported",
            where="store",
            hint=f"did you mean {close}://?"
            if close
            else f"set `store` to a folder, for example runs/, or to s3://bucket/prefix{brought}",
        )
    store: Store = installed.find("stores", scheme)(uri)
    lacking = [name for name in _METHODS if not callable(getattr(store, name, None))]
    lacking += [name for name in ("uri", "remote", "root") if not hasattr(store, name)]
    if lacking:
        raise ExtensionError(
            f"the store of {scheme}:// lacks {', '.join(lacking)}",
            where="store",
            hint="see orchestrator.Store",
        )
    if not store.remote:
        raise ExtensionError(
            f"the store of {scheme}:// says that it is not remote",
            where="store",
            hint="set remote = True: only a folder is read in place",
        )
    return store


class Needed(NamedTuple):
    """An artifact that workers need on their machines; the arguments of :func:`fetch`."""

    uri: str
    kind: str
    key: str
    only: tuple[str, ...] = ()


def fetch(uri: str, kind: str, key: str, only: Collection[str] = ()) -> Path:
    """The artifact's folder on this machine, complete; for workers that are not where the driver is.

    Args:
        uri: `Store.uri`.
        kind: of the artifact.
        key: of the artifact.
        only: names of its files and folders that are needed; none for all.

    Raises:
        FileNotFoundError: there is no such artifact.
        UserError: its copy in the store is damaged, or the store cannot be used.
    """
    artifacts = ArtifactStore(open_store(uri))
    found = artifacts.find(kind, key)
    if found is None:
        raise FileNotFoundError(f"there is no artifact {folder_name(kind, key)} in {uri}")
    return artifacts.fetch(found, only=only)
