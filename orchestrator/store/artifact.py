"""Immutable, content-addressed folders: an artifact is there once its manifest is, and never changes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.errors import UserError
from orchestrator.store.local import Store

MANIFEST = "manifest.json"
_TURN_S = 600.0
_TURN_POLL_S = 0.1
_FETCH_TRIES = 3
_AT_ONCE = 8
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

    @property
    def digest(self) -> str:
        """A hash of the content alone (16 hex digits): two artifacts of one key need not be equal to the last bit."""
        whole = hashlib.sha256()
        for name, entry in sorted(self.files.items()):
            whole.update(f"{len(name)}:{name}={entry.sha256};".encode())
        return whole.hexdigest()[:16]


@dataclass(frozen=True)
class Artifact:
    """An artifact. `path` is its folder on this machine; read it, never write to it.

    With a remote store the folder is complete after :meth:`ArtifactStore.fetch`.
    """

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

    def fetch(self, artifact: Artifact) -> Path:
        """Sees that all of the artifact is in its folder on this machine; what is there already stays.

        A copy is checked against the manifest's sha256 before it gets its name. Any number of processes may
        fetch one artifact at once: on one machine the first fetches and the others wait.

        Raises:
            UserError: the store's own copy is damaged.
        """
        if self.store.remote and not _is_whole_copy(artifact):
            lock = self.store.root / ".turns" / f"{artifact.path.name}.lock"
            with _turn(lock):
                if not _is_whole_copy(artifact):
                    self._fetch(artifact)
        return artifact.path

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
        *,
        anew: bool = False,
    ) -> Artifact:
        """Makes the content of `folder` the artifact (kind, key) and empties `folder` of its files.

        An intact artifact that is already there stays as it is and is returned: same key, same artifact. With `anew`
        it is replaced.
        What an attempt that died left behind without a manifest is removed first.

        Raises:
            ValueError: the folder holds a link, or a file called manifest.json at its top.
        """
        existing = None if anew else self.find(kind, key)
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
        remote = self.store.remote
        for name, path in files.items():
            self.store.put_file(prefix + name, path, consume=not remote)
        self.store.put_bytes(prefix + MANIFEST, manifest.model_dump_json(indent=1).encode())
        artifact = Artifact(key, kind, self.store.local(prefix), manifest)
        if remote:
            # What was made here need not be fetched here.
            for name, path in files.items():
                _move(path, artifact.path / name)
            self._note_copy(artifact)
        return artifact

    def _fetch(self, artifact: Artifact) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            fetched = [pool.submit(self._fetch_file, artifact, name) for name in artifact.manifest.files]
            for one in fetched:
                one.result()
        self._note_copy(artifact)

    def _fetch_file(self, artifact: Artifact, name: str) -> None:
        target, expected = artifact.path / name, artifact.manifest.files[name].sha256
        if target.is_file() and _sha256(target) == expected:
            return
        full = _prefix(artifact.kind, artifact.key) + name
        temporary = self.store.scratch("fetch")
        try:
            for _ in range(_FETCH_TRIES):
                self.store.get_file(full, temporary)
                if _sha256(temporary) == expected:
                    _move(temporary, target)
                    return
                _log.warning("%s came with another sha256 than it should have", full)
        finally:
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{full} in the store is damaged: its sha256 is not {expected}",
            where=f"store {self.store.uri}",
            hint=f"remove {_prefix(artifact.kind, artifact.key)}{MANIFEST} there and run again to make it anew",
        )

    def _note_copy(self, artifact: Artifact) -> None:
        """The manifest comes last here too: what it lists was checked."""
        temporary = self.store.scratch("manifest")
        temporary.write_text(artifact.manifest.model_dump_json(indent=1))
        _move(temporary, artifact.path / MANIFEST)

    def manifest_of(self, folder: str) -> Manifest | None:
        """The manifest in a folder of `artifacts/`, or None if there is none that can be read."""
        try:
            return Manifest.model_validate_json(self.store.get_bytes(f"artifacts/{folder}/{MANIFEST}"))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            _log.warning("unreadable manifest of artifacts/%s/: %s", folder, error)
            return None

    def _manifest(self, kind: str, key: str) -> Manifest | None:
        manifest = self.manifest_of(f"{kind}-{key[:16]}")
        if manifest is None:
            return None
        # The folder's name holds only the first 16 digits of the key.
        return manifest if (manifest.kind, manifest.key) == (kind, key) else None

    def _problems(self, manifest: Manifest, *, deep: bool) -> list[str]:
        if not self.store.remote:
            found = [self._problem(manifest, name, deep=deep) for name in manifest.files]
        else:
            # Each look is a request: side by side, a plan with many files stays quick.
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = list(pool.map(lambda name: self._problem(manifest, name, deep=deep), manifest.files))
        return [problem for problem in found if problem is not None]

    def _problem(self, manifest: Manifest, name: str, *, deep: bool) -> str | None:
        full, entry = _prefix(manifest.kind, manifest.key) + name, manifest.files[name]
        status = self.store.stat(full)
        if status is None:
            return f"{full}: missing"
        if status.size != entry.size:
            return f"{full}: {status.size} bytes, should be {entry.size}"
        if deep and self._hash(full) != entry.sha256:
            return f"{full}: content differs from the manifest's sha256"
        return None

    def _hash(self, name: str) -> str:
        if not self.store.remote:
            return _sha256(self.store.local(name))
        temporary = self.store.scratch("verify")
        try:
            self.store.get_file(name, temporary)
            return _sha256(temporary)
        finally:
            temporary.unlink(missing_ok=True)


def _is_whole_copy(artifact: Artifact) -> bool:
    """Whether the folder holds this very artifact: its manifest is noted, and no file is short."""
    try:
        noted = Manifest.model_validate_json((artifact.path / MANIFEST).read_bytes())
        sizes = {name: (artifact.path / name).stat().st_size for name in artifact.manifest.files}
    except (OSError, ValidationError):
        return False
    # As text: a figure may be NaN, which equals nothing.
    same = noted.model_dump_json() == artifact.manifest.model_dump_json()
    return same and sizes == {name: entry.size for name, entry in artifact.manifest.files.items()}


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """One process of this machine at a time, but none waits for ever: twice is wasteful, not wrong."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + _TURN_S
    with lock.open("w") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_TURN_POLL_S)
        yield


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


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
