"""Immutable, content-addressed folders: an artifact is there once its manifest is, and never changes.

A manifest has the sha256 of every file. :meth:`ArtifactStore.find` looks at names and sizes only;
:meth:`ArtifactStore.fetch`, which everybody who reads an artifact calls, compares the content. A process reads a file
for that once, as long as the file does not change (:class:`orchestrator.fsio.Digests`).
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.byte_counts import BYTES
from orchestrator.errors import UserError, first_line
from orchestrator.fsio import DIGESTS, link_or_copy
from orchestrator.names import inside, parts_of
from orchestrator.storage.artifact_copy import AT_ONCE, clear_surplus, is_copy, move_into_copy, turn
from orchestrator.storage.manifest import MANIFEST, FileEntry, Manifest, parsed
from orchestrator.storage.references import StoredObject, is_record, refer, references_in
from orchestrator.storage.store import CannotCopyError, Store, copy_within

_TOP = "artifacts/"
_FETCH_TRIES = 3
_WEIGHTS = ".safetensors"
_log = logging.getLogger(__name__)
# Damage to manifests that this process has said: a command reads them more than once.
_warned: set[tuple[str, str, str]] = set()
# The addresses of stores that refused to copy an object in this process, and the lock on them.
_do_not_copy: set[str] = set()
_lock = threading.Lock()


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

    With a `remote` store the folder is complete after :meth:`ArtifactStore.fetch`.
    """

    key: str
    kind: str
    path: Path
    manifest: Manifest
    remote: bool = False

    def object_name(self, name: str) -> str:
        """The name in the store of one of its files or folders."""
        return _prefix(self.kind, self.key) + name

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
        path, entry = inside(self.path, name), self.manifest.files.get(name)
        if self.remote and entry is not None:
            refer(target, StoredObject(self.object_name(name), entry.size, entry.sha256))
            return
        link_or_copy(path, target)
        if entry is not None:
            DIGESTS.note(target, entry.sha256)

    def link_folder(self, folder: Path, target: Path) -> None:
        """As :meth:`link`, of all files in one of its folders."""
        top = folder.relative_to(self.path)
        for name in self.digests(folder) or [path.relative_to(folder).as_posix() for path in _files(folder)]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            self.link((top / name).as_posix(), target / name)


def artifact_in(folder: Path, *, remote: bool) -> Artifact | None:
    """The artifact whose folder on this machine it is; None if there is no manifest in it."""
    try:
        manifest = parsed((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    return Artifact(manifest.key, manifest.kind, folder, manifest, remote)


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
        return Artifact(key, kind, self.store.local(_prefix(kind, key)), manifest, self.store.remote)

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

    def fetch(
        self, artifact: Artifact, *, uncompared: Collection[str] = (), only: Collection[str] = ()
    ) -> Path:
        """Sees that all of the artifact is in its folder on this machine, and that it is what its manifest says.

        Files that this process has compared before and that have not changed since are not read again. A copy of
        a remote artifact is mended. Any number of processes may fetch one artifact at once: on one machine the
        first fetches and the others wait.

        Args:
            artifact: to be read here.
            uncompared: folders at its top whose weights (`*.safetensors`) the process that reads them compares, and
                fetches. Where the store is on this machine, their names and sizes are compared here.
            only: names of files and folders in it that are fetched from a remote store; none for all.

        Raises:
            DamagedError: the store's own copy is damaged.
        """
        if not self.store.remote:
            problems = self._problems(artifact.manifest, deep=True, uncompared=uncompared)
            if problems:
                raise self._damaged(artifact, problems)
            return artifact.path
        names = [
            name
            for name in artifact.manifest.files
            if not _is_left_out(name, uncompared) and (not only or _is_below(name, only))
        ]
        if not is_copy(artifact, names):
            lock = self.store.root / ".turns" / f"{artifact.path.name}.lock"
            with turn(lock):
                if not is_copy(artifact, names):
                    self._fetch(artifact, names)
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
            FileNotFoundError: it has no manifest: it was never finished, so it is not an artifact.
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

        What is an object of the store already (:mod:`orchestrator.storage.references`) is copied within the store, or
        fetched and put where the store does not copy. The manifest has the sha256 that it came with.

        An intact artifact that is already there stays as it is and is returned: same key, same artifact. With `anew`
        it is replaced. What is damaged, and what an attempt that died left behind without a manifest, is removed
        first.

        Raises:
            ValueError: the folder holds no file, a link, a file called manifest.json at its top, or a name that
                :func:`~orchestrator.names.parts_of` refuses.
            UserError: a later version of this program wrote what is there.
            DamagedError: an object is not as large, or where it is fetched not what it was said to be.
        """
        existing = None if anew else self.intact(kind, key)
        if existing is not None:
            return existing
        prefix = _prefix(kind, key)
        files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        objects = references_in(folder)
        entries = {
            **{
                name: FileEntry(size=path.stat().st_size, sha256=DIGESTS.of(path))
                for name, path in files.items()
            },
            **{name: FileEntry(size=one.size, sha256=one.sha256) for name, one in objects.items()},
        }
        manifest = Manifest(
            kind=kind,
            key=key,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            files=dict(sorted(entries.items())),
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
        with ThreadPoolExecutor(AT_ONCE) as pool:
            # By `map`: once one fails, those that have not begun are left.
            list(pool.map(self._take_over, objects.values(), [prefix + name for name in objects]))
        self.store.put_bytes(prefix + MANIFEST, manifest.model_dump_json(indent=1).encode())
        artifact = Artifact(key, kind, self.store.local(prefix), manifest, remote)
        if remote:
            # What was made here need not be fetched here.
            for name, path in files.items():
                move_into_copy(path, artifact.path / name)
            self._note_copy(artifact)
        return artifact

    def _take_over(self, stored: StoredObject, name: str) -> None:
        """Make an object of the store a file of an artifact: a copy, or where the store makes none, by this machine."""
        if not self._copied(stored, name):
            temporary = self.store.scratch("copy")
            try:
                if not self._get(stored.name, stored.sha256, temporary):
                    raise self._not_as_noted(f"{stored.name} is damaged: its sha256 is not {stored.sha256}")
                self.store.put_file(name, temporary)
                BYTES.written("artifact", stored.size)
            finally:
                temporary.unlink(missing_ok=True)
        size = self._size(name)
        if size != stored.size:
            found = "no object" if size is None else f"{size} bytes"
            raise self._not_as_noted(f"{name}: {found}, should be {stored.size} bytes as {stored.name}")

    def _copied(self, stored: StoredObject, target: str) -> bool:
        """Copy within the store; False if it does not copy, which is said once."""
        if self.store.uri in _do_not_copy:
            return False
        try:
            copy_within(self.store, stored.name, target)
            if self._size(target) != stored.size == self._size(stored.name):
                # A server that knows no copies may take one for an object without content.
                raise CannotCopyError(f"the copy of {stored.name} has another size")
        except CannotCopyError as error:
            with _lock:
                known = self.store.uri in _do_not_copy
                _do_not_copy.add(self.store.uri)
            if not known:
                _log.warning(
                    "the store %s does not copy objects, so finished files pass through this machine: %s",
                    self.store.uri,
                    error,
                )
            return False
        return True

    def _size(self, name: str) -> int | None:
        status = self.store.stat(name)
        return None if status is None else status.size

    def _not_as_noted(self, problem: str) -> DamagedError:
        hint = "run the same command again; if that does not help, run the stage with --force"
        return DamagedError([problem], where=f"store {self.store.uri}", hint=hint)

    def _fetch(self, artifact: Artifact, names: Collection[str]) -> None:
        clear_surplus(artifact)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            fetched = [pool.submit(self._fetch_file, artifact, name) for name in names]
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
            if self._get(full, expected, temporary):
                move_into_copy(temporary, target)
                return
        finally:
            temporary.unlink(missing_ok=True)
        raise self._damaged(artifact, [f"{full} in the store is damaged: its sha256 is not {expected}"])

    def _get(self, name: str, sha256: str, target: Path) -> bool:
        """Download an object, again if it was damaged on the way; False if it always was."""
        for _ in range(_FETCH_TRIES):
            self.store.get_file(name, target)
            BYTES.read("artifact", target.stat().st_size)
            if DIGESTS.of(target) == sha256:
                return True
            _log.warning("%s was downloaded with the wrong sha256", name)
        return False

    def _damaged(self, artifact: Artifact, problems: list[str]) -> DamagedError:
        prefix = _prefix(artifact.kind, artifact.key)
        return DamagedError(
            problems,
            # Of a worker's error the driver gets the text alone, and finds the artifact by this address.
            where=f"{self.store.uri.rstrip('/')}/{prefix.rstrip('/')}",
            hint=f"run the pipeline again to replace it; if that does not help, remove {prefix}{MANIFEST} first",
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
        move_into_copy(temporary, artifact.path / MANIFEST)

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
            if said not in _warned:
                _warned.add(said)
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
        with ThreadPoolExecutor(AT_ONCE) as pool:
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


def _is_below(name: str, places: Collection[str]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)


def _prefix(kind: str, key: str) -> str:
    return f"{_TOP}{folder_name(kind, key)}/"


def _files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    if not paths:
        raise ValueError(f"an artifact needs at least one file: {folder}")
    paths = [path for path in paths if not is_record(path)]
    for path in paths:
        parts_of(path.relative_to(folder).as_posix())
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"an artifact may only contain plain files: {path}")
    if folder / MANIFEST in paths:
        raise ValueError(f"{MANIFEST} is the artifact's own: {folder / MANIFEST}")
    return paths
