"""Immutable, content-addressed folders: an artifact is there once its manifest is, and never changes.

A manifest has the sha256 of every file. :meth:`ArtifactStore.find` looks at names and sizes only;
:meth:`ArtifactStore.fetch`, which everybody who reads an artifact calls, compares the content. A process reads a file
for that once, as long as the file does not change (:class:`orchestrator.fsio.Digests`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.byte_counts import BYTES
from orchestrator.errors import UserError, first_line
from orchestrator.fsio import DIGESTS, link_or_copy, move
from orchestrator.names import inside, parts_of
from orchestrator.storage.manifest import MANIFEST, FileEntry, Manifest, parsed
from orchestrator.storage.store import Store

_TOP = "artifacts/"
_TURN_S = 600.0
_TURN_POLL_S = 0.1
_FETCH_TRIES = 3
_WEIGHTS = ".safetensors"
_AT_ONCE = 8
_log = logging.getLogger(__name__)
# Damage to manifests that this process has said: a command reads them more than once.
_said: set[tuple[str, str, str]] = set()


class DamagedError(UserError):
    """An artifact is not what its manifest says.

    Attributes:
        problems: a line for each file that is wrong.
    """

    def __init__(self, problems: list[str], *, where: str, hint: str) -> None:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        super().__init__(f"{problems[0]}{more}", where=where, hint=hint)
        self.problems = problems


@dataclass(frozen=True)
class Artifact:
    """An artifact. `path` is its folder on this machine; read it, never write to it.

    With a remote store the folder is complete after :meth:`ArtifactStore.fetch`.
    """

    key: str
    kind: str
    path: Path
    manifest: Manifest

    def digests(self, folder: Path) -> dict[str, str]:
        """The sha256 of the files in one of its folders, by their names in that folder."""
        top = f"{folder.relative_to(self.path).as_posix()}/"
        files = self.manifest.files
        return {name.removeprefix(top): files[name].sha256 for name in files if name.startswith(top)}

    def link(self, name: str, target: Path) -> None:
        """Make one of its files part of another artifact too. Nobody reads it: its manifest has its sha256.

        Raises:
            ValueError: the name leads out of the artifact.
        """
        link_or_copy(inside(self.path, name), target)
        entry = self.manifest.files.get(name)
        if entry is not None:
            DIGESTS.note(target, entry.sha256)

    def link_folder(self, folder: Path, target: Path) -> None:
        """As :meth:`link`, of all files in one of its folders."""
        top = folder.relative_to(self.path)
        for name in self.digests(folder) or [path.relative_to(folder).as_posix() for path in _files(folder)]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            self.link((top / name).as_posix(), target / name)


def folder_name(kind: str, key: str) -> str:
    """What the folders of a key are called, below `artifacts/` and below `work/`."""
    return f"{kind}-{key[:16]}"


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
        """The artifact, or None if there is none or its files are not those of its manifest, by name and size.

        Raises:
            UserError: a later version of this program wrote it.
        """
        manifest = self._manifest(kind, key)
        if manifest is None:
            return None
        problems = self._problems(manifest, deep=False)
        if problems:
            self._note_damage(kind, key, problems)
            return None
        return Artifact(key, kind, self.store.local(_prefix(kind, key)), manifest)

    def intact(self, kind: str, key: str, *, uncompared: Collection[str] = ()) -> Artifact | None:
        """The artifact, its content compared with its manifest and on this machine; None if it is not whole.

        See :meth:`fetch` for `uncompared`.
        """
        found = self.find(kind, key)
        try:
            if found is not None:
                self.fetch(found, uncompared=uncompared)
        except DamagedError as error:
            self._note_damage(kind, key, error.problems)
            return None
        return found

    def fetch(self, artifact: Artifact, *, uncompared: Collection[str] = ()) -> Path:
        """Sees that all of the artifact is in its folder on this machine, and that it is what its manifest says.

        Files that this process has compared before and that have not changed since are not read again. A copy of
        a remote artifact is mended. Any number of processes may fetch one artifact at once: on one machine the
        first fetches and the others wait.

        Args:
            artifact: to be read here.
            uncompared: folders at its top whose weights (`*.safetensors`) the process that reads them compares. Where
                the store is on this machine, their names and sizes are compared here, and not their content.

        Raises:
            DamagedError: the store's own copy is damaged.
        """
        if not self.store.remote:
            problems = self._problems(artifact.manifest, deep=True, uncompared=uncompared)
            if problems:
                raise self._damaged(artifact, problems)
        elif not _is_whole_copy(artifact):
            lock = self.store.root / ".turns" / f"{artifact.path.name}.lock"
            with _turn(lock):
                if not _is_whole_copy(artifact):
                    self._fetch(artifact)
        return artifact.path

    def prefixes(self) -> list[str]:
        """The folders below `artifacts/` that have anything in them: what their objects' names begin with.

        Of a folder on this machine, links count too: :meth:`examine` says that they are none.
        """
        names = [name.split("/") for name in self.store.list(_TOP)]
        return sorted({f"{_TOP}{parts[1]}/" for parts in names if len(parts) > 2 or self._is_link(*parts)})

    def _is_link(self, *parts: str) -> bool:
        return not self.store.remote and self.store.root.joinpath(*parts).is_symlink()

    def examine(self, prefix: str) -> list[str]:
        """What is wrong with one of :meth:`prefixes`, a line each; every file is read.

        Raises:
            FileNotFoundError: it has no manifest: it was never finished, so it is no artifact.
            UserError: a later version of this program wrote it.
        """
        try:
            manifest = parsed(self.store.get_bytes(prefix + MANIFEST))
        except ValueError as error:
            return [f"{prefix}{MANIFEST}: {first_line(error)}"]
        if _prefix(manifest.kind, manifest.key) != prefix:
            return [f"{prefix}{MANIFEST}: is the manifest of {_prefix(manifest.kind, manifest.key)}"]
        return self._problems(manifest, deep=True)

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
        it is replaced. What is damaged, and what an attempt that died left behind without a manifest, is removed
        first.

        Raises:
            ValueError: the folder holds no file, a link, a file called manifest.json at its top, or a name that
                :func:`~orchestrator.names.parts_of` refuses.
            UserError: a later version of this program wrote what is there.
        """
        existing = None if anew else self.intact(kind, key)
        if existing is not None:
            return existing
        prefix = _prefix(kind, key)
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        manifest = Manifest(
            kind=kind,
            key=key,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files={
                name: FileEntry(size=path.stat().st_size, sha256=DIGESTS.of(path))
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
        # What has another name is linked: the process that wrote it counted it.
        BYTES.written(
            "artifact",
            sum(one.st_size for one in map(Path.stat, files.values()) if remote or one.st_nlink == 1),
        )
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
        _clear_surplus(artifact)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            fetched = [pool.submit(self._fetch_file, artifact, name) for name in artifact.manifest.files]
            for one in fetched:
                one.result()
        self._note_copy(artifact)

    def _fetch_file(self, artifact: Artifact, name: str) -> None:
        target, expected = inside(artifact.path, name), artifact.manifest.files[name].sha256
        if target.is_file() and DIGESTS.of(target) == expected:
            return
        full = _prefix(artifact.kind, artifact.key) + name
        temporary = self.store.scratch("fetch")
        try:
            for _ in range(_FETCH_TRIES):
                self.store.get_file(full, temporary)
                BYTES.read("artifact", temporary.stat().st_size)
                if DIGESTS.of(temporary) == expected:
                    _move(temporary, target)
                    return
                _log.warning("%s was downloaded with the wrong sha256", full)
        finally:
            temporary.unlink(missing_ok=True)
        raise self._damaged(artifact, [f"{full} in the store is damaged: its sha256 is not {expected}"])

    def _damaged(self, artifact: Artifact, problems: list[str]) -> DamagedError:
        return DamagedError(
            problems,
            where=f"store {self.store.uri}",
            hint="run the pipeline again to replace it; if that does not help, remove "
            f"{_prefix(artifact.kind, artifact.key)}{MANIFEST} first",
        )

    def _note_damage(self, kind: str, key: str, problems: list[str]) -> None:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        _log.warning(
            "artifact %s is damaged and will be made again: %s%s", _prefix(kind, key), problems[0], more
        )

    def _note_copy(self, artifact: Artifact) -> None:
        """The manifest comes last here too: what it lists was checked."""
        temporary = self.store.scratch("manifest")
        temporary.write_text(artifact.manifest.model_dump_json(indent=1))
        _move(temporary, artifact.path / MANIFEST)

    def manifest_of(self, folder: str) -> Manifest | None:
        """The manifest in a folder of `artifacts/`, or None if there is none that can be read.

        Raises:
            UserError: a later version of this program wrote it.
        """
        name = f"{_TOP}{folder}/{MANIFEST}"
        try:
            text = self.store.get_bytes(name)
            BYTES.read("artifact", len(text))
            return parsed(text)
        except FileNotFoundError:
            return None
        except ValueError as error:
            said = (self.store.uri, name, first_line(error))
            if said not in _said:
                _said.add(said)
                _log.warning("%s is damaged, the artifact will be made again: %s", name, said[2])
            return None
        except UserError as error:
            raise UserError(error.what, where=f"{name} in store {self.store.uri}", hint=error.hint) from None

    def _manifest(self, kind: str, key: str) -> Manifest | None:
        manifest = self.manifest_of(folder_name(kind, key))
        if manifest is None:
            return None
        # The folder's name holds only the first 16 digits of the key.
        return manifest if (manifest.kind, manifest.key) == (kind, key) else None

    def _problems(self, manifest: Manifest, *, deep: bool, uncompared: Collection[str] = ()) -> list[str]:
        def problem(name: str) -> str | None:
            return self._problem(manifest, name, deep=deep and not _is_left_out(name, uncompared))

        # Side by side: each look is a request or, deep, a file to be read.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = list(pool.map(problem, manifest.files))
        prefix = _prefix(manifest.kind, manifest.key)
        surplus = {name.removeprefix(prefix) for name in self.store.list(prefix)} - {
            MANIFEST,
            *manifest.files,
        }
        found += [f"{prefix}{name}: is not in the manifest" for name in sorted(surplus)]
        return [problem for problem in found if problem is not None]

    def _problem(self, manifest: Manifest, name: str, *, deep: bool) -> str | None:
        full, entry = _prefix(manifest.kind, manifest.key) + name, manifest.files[name]
        status = self.store.stat(full)
        if status is None:
            there = not self.store.remote and os.path.lexists(self.store.root / full)
            return f"{full}: not a regular file" if there else f"{full}: missing"
        if status.size != entry.size:
            return f"{full}: {status.size} bytes, should be {entry.size}"
        if deep and self._hash(full) != entry.sha256:
            return f"{full}: content differs from the manifest's sha256"
        return None

    def _hash(self, name: str) -> str:
        if not self.store.remote:
            return DIGESTS.of(self.store.local(name))
        temporary = self.store.scratch("verify")
        try:
            self.store.get_file(name, temporary)
            BYTES.read("artifact", temporary.stat().st_size)
            return DIGESTS.of(temporary)
        finally:
            temporary.unlink(missing_ok=True)


def _is_left_out(name: str, uncompared: Collection[str]) -> bool:
    return name.endswith(_WEIGHTS) and name.partition("/")[0] in uncompared


def _is_whole_copy(artifact: Artifact) -> bool:
    """Whether the folder holds this very artifact: its manifest is noted, its files are right and no others there."""
    files = artifact.manifest.files
    try:
        noted = parsed((artifact.path / MANIFEST).read_bytes())
        # As text: a figure may be NaN, which equals nothing.
        if noted.model_dump_json() != artifact.manifest.model_dump_json() or _surplus(artifact):
            return False
        paths = {name: inside(artifact.path, name) for name in files}
        if any(paths[name].stat().st_size != entry.size for name, entry in files.items()):
            return False
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            digests = pool.map(DIGESTS.of, paths.values())
            return all(one == entry.sha256 for one, entry in zip(digests, files.values(), strict=True))
    except (OSError, ValueError, UserError):
        return False


def _surplus(artifact: Artifact) -> list[Path]:
    """What is in the copy and not in the manifest: files, and whatever else is no folder."""
    found = []
    for parent, folders, files in os.walk(artifact.path):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for path in (Path(parent) / name for name in (*files, *links)):
            name = path.relative_to(artifact.path).as_posix()
            if name != MANIFEST and (name not in artifact.manifest.files or path.is_symlink()):
                found.append(path)
    return found


def _clear_surplus(artifact: Artifact) -> None:
    for path in _surplus(artifact):
        path.unlink(missing_ok=True)
    for name in artifact.manifest.files:
        if (path := artifact.path / name).is_dir():
            shutil.rmtree(path)


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
    # Of a copy: it is compared with its manifest when it is read, and fetched again.
    move(source, target, durable=False)


def _prefix(kind: str, key: str) -> str:
    return f"{_TOP}{folder_name(kind, key)}/"


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    if not paths:
        raise ValueError(f"an artifact needs at least one file: {folder}")
    for path in paths:
        parts_of(path.relative_to(folder).as_posix())
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"an artifact may only contain plain files: {path}")
    if folder / MANIFEST in paths:
        raise ValueError(f"{MANIFEST} is the artifact's own: {folder / MANIFEST}")
    return paths
