"""From a store's address to the store, and from an artifact's name to its folder on this machine."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.store.artifact import ArtifactStore, folder_name
from orchestrator.store.local import LocalStore, Store
from orchestrator.store.s3 import S3Store
from orchestrator.store.s3client import Patience


def is_remote(uri: str) -> bool:
    """Whether the store at `uri` is anything but a folder."""
    return "://" in uri and not uri.startswith("file://")


def open_store(uri: str, patience: Patience | None = None) -> Store:
    """The store at `uri`: a folder, `file://` and an absolute path, or `s3://bucket/prefix`.

    A folder is made if it is missing. S3 is not connected to: its first use is.

    Args:
        uri: its address.
        patience: how long to put up with the server of S3.

    Raises:
        UserError: the scheme is not supported, or the folder cannot be written.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalStore(uri)
    if scheme == "file":
        return LocalStore(rest)
    if scheme == "s3":
        return S3Store(uri, patience)
    raise UserError(
        f"a store of kind {scheme}:// is not supported",
        where="store",
        hint="set `store` to a folder, for example runs/, or to s3://bucket/prefix",
    )


def fetch(uri: str, kind: str, key: str) -> Path:
    """The artifact's folder on this machine, complete; for workers that are not where the driver is.

    Args:
        uri: `Store.uri`.
        kind: of the artifact.
        key: of the artifact.

    Raises:
        FileNotFoundError: there is no such artifact.
        UserError: its copy in the store is damaged, or the store cannot be used.
    """
    artifacts = ArtifactStore(open_store(uri))
    found = artifacts.find(kind, key)
    if found is None:
        raise FileNotFoundError(f"there is no artifact {folder_name(kind, key)} in {uri}")
    return artifacts.fetch(found)
