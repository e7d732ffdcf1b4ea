"""Immutable, content-addressed folders: an artifact is there once its manifest is, and never changes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.store.local import Store

MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


class FileEntry(BaseModel):
    """One file of an artifact: size in bytes and sha256 in hex."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact holds and where it came from.

    Attributes:
        kind: the kind of stage that made it.
        key: the content key of the stage that made it.
        created: UTC, ISO 8601.
        files: by path relative to the artifact's folder, POSIX style.
        provenance: whatever explains it: config, upstream keys, versions.
        summary: the figures the stage returned.
    """

    # JSON has no NaN and pydantic would write null, which is no float when read back.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    kind: str
    key: str
    created: str
    files: dict[str, FileEntry]
    provenance: dict[str, Any]
    summary: dict[str, float]


@dataclass(frozen=True)
class Artifact:
    """An artifact on this machine. `path` is its folder; read it, never write to it."""

    key: str
    kind: str
    path: Path
    manifest: Manifest


class ArtifactStore:
    """Artifacts below `artifacts/` of a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def staging(self, label: str) -> Path:
        """A new empty folder to build an artifact in; it vanishes after this process if not published."""
        folder = self.store.scratch(label)
        folder.mkdir(parents=True)
        return folder

    def find(self, kind: str, key: str) -> Artifact | None:
        """The artifact, or None if there is none or a file of it is missing or has another size."""
        manifest = self._manifest(kind, key)
        if manifest is None:
            return None
        problems = self._problems(manifest, deep=False)
        if problems:
            _log.warning("artifact %s is damaged and will be made again: %s", _prefix(kind, key), problems[0])
            return None
        return Artifact(key, kind, self.store.local(_prefix(kind, key)), manifest)

    def verify(self, kind: str, key: str, *, deep: bool = False) -> list[str]:
        """What is wrong with the artifact, one line each; empty if nothing is. `deep` hashes all files."""
        manifest = self._manifest(kind, key)
        if manifest is None:
            return [f"{_prefix(kind, key)}{MANIFEST}: missing or unreadable"]
        return self._problems(manifest, deep=deep)

    def publish(
        self,
        kind: str,
        key: str,
        folder: Path,
        provenance: Mapping[str, Any] | None = None,
        summary: Mapping[str, float] | None = None,
    ) -> Artifact:
        """Makes the content of `folder` the artifact (kind, key) and empties `folder` of its files.

        An intact artifact that is already there stays as it is and is returned: same key, same artifact.
        What an attempt that died left behind without a manifest is removed first.

        Raises:
            ValueError: the folder holds a link, or a file called manifest.json at its top.
        """
        existing = self.find(kind, key)
        if existing is not None:
            return existing
        prefix = _prefix(kind, key)
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        manifest = Manifest(
            kind=kind,
            key=key,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={
                name: FileEntry(size=path.stat().st_size, sha256=_sha256(path))
                for name, path in files.items()
            },
            provenance=dict(provenance or {}),
            summary=dict(summary or {}),
        )
        # The manifest goes first when a damaged artifact is cleared, and comes last when it is made.
        self.store.delete(prefix + MANIFEST)
        for name in list(self.store.list(prefix)):
            self.store.delete(name)
        for name, path in files.items():
            self.store.put_file(prefix + name, path, consume=True)
        self.store.put_bytes(prefix + MANIFEST, manifest.model_dump_json(indent=1).encode())
        return Artifact(key, kind, self.store.local(prefix), manifest)

    def _manifest(self, kind: str, key: str) -> Manifest | None:
        try:
            manifest = Manifest.model_validate_json(self.store.get_bytes(_prefix(kind, key) + MANIFEST))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            _log.warning("unreadable manifest of %s: %s", _prefix(kind, key), error)
            return None
        # The folder's name holds only the first 16 digits of the key.
        return manifest if (manifest.kind, manifest.key) == (kind, key) else None

    def _problems(self, manifest: Manifest, *, deep: bool) -> list[str]:
        prefix = _prefix(manifest.kind, manifest.key)
        problems = []
        for name, entry in manifest.files.items():
            status = self.store.stat(prefix + name)
            if status is None:
                problems.append(f"{prefix}{name}: missing")
            elif status.size != entry.size:
                problems.append(f"{prefix}{name}: {status.size} bytes, should be {entry.size}")
            elif deep and _sha256(self.store.local(prefix) / name) != entry.sha256:
                problems.append(f"{prefix}{name}: content differs from the manifest's sha256")
        return problems


def _prefix(kind: str, key: str) -> str:
    return f"artifacts/{kind}-{key[:16]}/"


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"an artifact holds plain files only: {path}")
    if folder / MANIFEST in paths:
        raise ValueError(f"{MANIFEST} is the artifact's own: {folder / MANIFEST}")
    return paths


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
