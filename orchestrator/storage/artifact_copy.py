"""The copy of an artifact of a remote store on this machine: all of its files, or those that were needed so far."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS, move
from orchestrator.names import inside
from orchestrator.storage.manifest import MANIFEST, parsed

if TYPE_CHECKING:
    from orchestrator.storage.artifacts import Artifact

# Files or objects that are looked at side by side.
AT_ONCE = 8
_TURN_S = 600.0
_TURN_POLL_S = 0.1


def is_copy(artifact: Artifact, names: Collection[str]) -> bool:
    """Whether the folder is of this very artifact: its manifest is noted, these files are right, no others than its."""
    files = {name: artifact.manifest.files[name] for name in names}
    try:
        noted = parsed((artifact.path / MANIFEST).read_bytes())
        # As text: a figure may be NaN, which equals nothing.
        if noted.model_dump_json() != artifact.manifest.model_dump_json() or _surplus(artifact):
            return False
        paths = {name: inside(artifact.path, name) for name in files}
        if any(paths[name].stat().st_size != entry.size for name, entry in files.items()):
            return False
        with ThreadPoolExecutor(AT_ONCE) as pool:
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


def clear_surplus(artifact: Artifact) -> None:
    """Remove from the copy what is not in the manifest."""
    for path in _surplus(artifact):
        path.unlink(missing_ok=True)
    for name in artifact.manifest.files:
        if (path := artifact.path / name).is_dir():
            shutil.rmtree(path)


@contextlib.contextmanager
def turn(lock: Path) -> Iterator[None]:
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


def move_into_copy(source: Path, target: Path) -> None:
    """Give a finished file its name in the copy, on the same file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Of a copy: it is compared with its manifest when it is read, and fetched again.
    move(source, target, durable=False)
