"""Where a job's checkpoints are: a local folder, or a store with a local folder in front of it.

With a store each worker writes its file to the local folder, uploads it, and the manifest is put last; readers
fetch what they need and trust a local copy only if its size and sha256 are right. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import (
    DIGESTS,
    atomic_create,
    atomic_write,
    link_or_copy,
    make_folder,
    open_regular,
    sync_folder,
)
from orchestrator.storage.references import StoredObject, refer
from orchestrator.storage.store import Store
from orchestrator.training.checkpoint import format as form
from orchestrator.training.checkpoint.format import (
    COMMIT,
    CheckpointError,
    CheckpointManifest,
    step_name,
    step_of,
)

logger = logging.getLogger("orchestrator")

_OWNER = "owner.json"


@dataclass(frozen=True)
class CheckpointStorage:
    """Checkpoints below `folder`, or in `store` below `prefix` with copies of some files in `folder`."""

    folder: Path
    store: Store | None = None
    prefix: str = ""

    # --- groups of workers ------------------------------------------------------------------------------------

    def owner(self) -> str | None:
        """The token of the newest group that took these checkpoints over.

        Where the record of it is damaged, that of the newest group that wrote anything.
        """
        try:
            record = json.loads(self.read(_OWNER))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            record = None
        token = record.get("token") if isinstance(record, dict) else None
        if isinstance(token, str) and form.TOKEN.fullmatch(token):
            return token
        logger.warning(
            "%s is damaged: the latest worker group is determined from its files", self._owner_name()
        )
        folders = (name.split("/")[1] for name in self._names())
        tokens = [folder for folder in folders if form.TOKEN.fullmatch(folder)]
        return max(tokens, key=lambda one: (len(one), one), default=None)

    def _owner_name(self) -> str:
        return str(self.folder / _OWNER) if self.store is None else self._stored(_OWNER)

    def acquire(self) -> str:
        """Take these checkpoints over for a new group of workers; returns its token, `a0001` at first."""
        owner = self.owner()
        token = f"a{int(owner[1:]) + 1 if owner else 1:04d}"
        self.put(_OWNER, json.dumps({"token": token}).encode())
        return token

    def check_owner(self, token: str) -> None:
        """See that no group newer than `token` has taken over: a worker that was thought dead must not commit.

        Raises:
            CheckpointError: one has.
        """
        owner = self.owner()
        if owner is not None and is_newer(owner, token):
            raise CheckpointError(f"group {token} may not commit: group {owner} has taken over")

    # --- objects ----------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, whole or not at all."""
        BYTES.written("checkpoint", len(data))
        if self.store is not None:
            self.store.put_bytes(self._stored(name), data)
            return
        make_folder((self.folder / name).parent)
        atomic_write(self.folder / name, data)

    def publish(self, name: str) -> None:
        """Make the finished local file `name` readable by every worker."""
        if self.store is not None:
            self.store.put_file(self._stored(name), self.folder / name)
            BYTES.written("checkpoint", (self.folder / name).stat().st_size)

    def read(self, name: str) -> bytes:
        """A small object. Raises FileNotFoundError if there is none."""
        if self.store is not None:
            data = self.store.get_bytes(self._stored(name))
        else:
            with open_regular(self.folder / name) as file:
                data = file.read()
        BYTES.read("checkpoint", len(data))
        return data

    def commit(self, step: int, token: str, manifest: bytes) -> None:
        """Put the manifest of `step`, unless a newer group's is there.

        Raises:
            CheckpointError: a newer group has taken over, or has committed this step.
        """
        self.check_owner(token)
        name = f"{step_name(step)}/{COMMIT}"
        if self.store is None:
            make_folder((self.folder / name).parent)
            # What is there is not replaced: even a worker stopped right before this line and woken much later must
            # not replace what a newer group committed meanwhile.
            if atomic_create(self.folder / name, manifest):
                return
        try:
            present = form.parse(self.read(name), self.folder).token
        except (FileNotFoundError, CheckpointError):
            present = ""
        if is_newer(present, token):
            raise CheckpointError(f"group {token} may not commit step {step}: group {present} has")
        self.put(name, manifest)

    def _stored(self, name: str) -> str:
        return f"{self.prefix.rstrip('/')}/{name}" if self.prefix else name

    # --- checkpoints ------------------------------------------------------------------------------------------

    def committed(self) -> list[int]:
        """Steps of the committed checkpoints, newest first; whether they are whole is not looked at."""
        steps = (step_of(name) for name in self._names() if name.endswith(f"/{COMMIT}"))
        return sorted({step for step in steps if step is not None}, reverse=True)

    def find(self, step: int) -> CheckpointManifest:
        """The checkpoint of `step`, by its manifest alone. Raises CheckpointError as :func:`format.parse` does."""
        path = self.folder / step_name(step)
        try:
            return form.parse(self.read(f"{step_name(step)}/{COMMIT}"), path)
        except FileNotFoundError:
            raise CheckpointError("it was never committed") from None

    def fetch(self, manifest: CheckpointManifest, name: str) -> None:
        """See that file `name` of `manifest` is whole and in the local folder.

        Raises:
            CheckpointError: it is damaged or gone.
            OSError: the store cannot be reached, or the local disk cannot take it.
        """
        file, entry = manifest.path / name, manifest.files[name]
        wrong = form.problem(file, entry)
        if wrong and self.store is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.store.get_file(self._stored(f"{step_name(manifest.step)}/{name}"), file)
                BYTES.read("checkpoint", file.stat().st_size)
            except FileNotFoundError:
                raise CheckpointError(f"{name} is missing") from None
            wrong = form.problem(file, entry)
        if wrong:
            raise CheckpointError(f"{name} {wrong}")

    def whole(self, step: int) -> CheckpointManifest:
        """The checkpoint of `step` with every file and the manifest in the local folder, checked; to be copied.

        Raises:
            CheckpointError: it is not committed, or damaged.
            OSError: the store cannot be reached, or the local disk cannot take it.
        """
        manifest = self.find(step)
        for name in manifest.files:
            self.fetch(manifest, name)
        if self.store is not None:
            CheckpointStorage(self.folder).put(
                f"{step_name(step)}/{COMMIT}", json.dumps(manifest.meta, indent=1).encode()
            )
        return manifest

    def refer(self, step: int, folder: Path) -> None:
        """Make the checkpoint of `step`, which is in the store, part of an artifact in the making without its content.

        Raises:
            CheckpointError: it is not committed, or its manifest is damaged.
        """
        manifest = self.find(step)
        for name, entry in manifest.files.items():
            stored = self._stored(f"{step_name(step)}/{name}")
            refer(folder / name, StoredObject(stored, int(entry["size"]), str(entry["sha256"])))
        (folder / COMMIT).write_text(json.dumps(manifest.meta, indent=1), encoding="utf-8")

    def adopt(self, checkpoint: Path) -> CheckpointManifest:
        """Make the finished checkpoint in a folder of elsewhere the newest one here: training goes on from it.

        Raises:
            CheckpointError: it is damaged, or there is a newer group of workers.
        """
        manifest = form.verified(checkpoint, DIGESTS.of)
        # The next group is a newer one than that which wrote it.
        self.put(_OWNER, json.dumps({"token": manifest.token}).encode())
        for name in manifest.files:
            target = f"{step_name(manifest.step)}/{name}"
            make_folder((self.folder / target).parent)
            link_or_copy(checkpoint / name, self.folder / target)
            self.publish(target)
        self.commit(manifest.step, manifest.token, (checkpoint / COMMIT).read_bytes())
        return self.find(manifest.step)

    # --- pruning ----------------------------------------------------------------------------------------------

    def prune(self, step: int, token: str, keep: int, keep_every: int | None) -> None:
        """Remove what the group `token`, which has just committed `step`, no longer needs.

        The newest `keep` committed checkpoints stay, and those of multiples of `keep_every`. Newer ones than
        `step` were found damaged when the group began, or come from workers thought dead.
        """
        committed = self.committed()
        stay = [one for one in committed if one <= step]
        kept = set(stay[:keep]) | {one for one in stay if keep_every and one % keep_every == 0}
        for one in committed:
            if one not in kept:
                # Uncommit first: a kill in the middle of the removal must not leave a torn but committed folder.
                self._remove(f"{step_name(one)}/{COMMIT}")
        self.sweep(token, before=step)

    def sweep(self, token: str, before: int = 0) -> None:
        """Remove files no manifest lists: those of steps before `before`, and those of groups before `token`.

        Later ones of the group itself may be in the middle of being written.
        """
        used: dict[int, str | None] = {}
        for step in self.committed():
            try:
                used[step] = self.find(step).token
            except CheckpointError:
                used[step] = None  # unreadable, or of a later version: nothing of it is touched
        for name in self._names():
            found, folder = step_of(name), name.split("/")[1]
            if found is None or folder == COMMIT or used.get(found, "") in (None, folder):
                continue
            if found < before or (form.TOKEN.fullmatch(folder) and is_newer(token, folder)):
                self._remove(name)
        if self.store is None:
            self._sweep_folders(token, before)

    def forget(self, step: int, keep: int) -> None:
        """Drop local copies of what is in the store, but for the `keep` newest up to `step`."""
        if self.store is None:
            return
        steps = {
            path: found for path in self.folder.glob("step-*") if (found := step_of(path.name)) is not None
        }
        past = sorted((path for path in steps if steps[path] <= step), key=lambda path: steps[path])
        for path in past[:-keep]:
            shutil.rmtree(path, ignore_errors=True)

    def _names(self) -> list[str]:
        if self.store is not None:
            top = self._stored("step-")
            return [name[len(top) - len("step-") :] for name in self.store.list(top)]
        # os.walk, since it does not mind folders that vanish while it looks.
        found = [
            (Path(parent), files) for top in self.folder.glob("step-*") for parent, _, files in os.walk(top)
        ]
        return sorted(
            (parent / file).relative_to(self.folder).as_posix() for parent, files in found for file in files
        )

    def _remove(self, name: str) -> None:
        if self.store is not None:
            self.store.delete(self._stored(name))
            return
        (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            sync_folder((self.folder / name).parent)

    def _sweep_folders(self, token: str, before: int) -> None:
        # An empty folder may be one that a worker of this group has just made to write into.
        for path in self.folder.glob("step-*/*/"):
            if form.TOKEN.fullmatch(path.name) and is_newer(token, path.name):
                _remove_empty(path)
        for path in self.folder.glob("step-*/"):
            if (step := step_of(path.name)) is not None and step < before:
                for inner in path.glob("*/"):
                    _remove_empty(inner)
                _remove_empty(path)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or gone already
        folder.rmdir()


def is_newer(token: str, than: str) -> bool:
    """Whether group `token` was formed after group `than`; tokens are a letter and a count."""
    return (len(token), token) > (len(than), than)
