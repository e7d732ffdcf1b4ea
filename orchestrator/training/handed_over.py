"""Files that a worker writes and the driver links into an artifact, with their sha256: nobody reads them for that.

Beside such a file lies `.<name>.sha256` with what the worker said. It holds for the very file: one with another size or
time of last change is read and hashed as any other. In a store it lies beside the object, and likewise holds for the
object's own size and time: a worker that was thought dead may have put another one there since.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import TypeVar

from orchestrator.byte_counts import BYTES
from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS, atomic_write, link_or_copy, open_regular, sha256_of
from orchestrator.names import inside
from orchestrator.storage.references import StoredObject, refer
from orchestrator.storage.store import Store

PathT = TypeVar("PathT", bound=PurePath)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def note(path: Path, sha256: str | None = None) -> None:
    """Say what a finished file's sha256 is, and count it as written; None reads it once more to know."""
    status = path.stat()
    if sha256 is None:
        sha256 = sha256_of(path)
        BYTES.read("checkpoint", status.st_size)
    said = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
    # Without it the file is hashed: that costs time only.
    atomic_write(_beside(path), json.dumps(said), durable=False, only_writer=True)
    BYTES.written("checkpoint", status.st_size)


def hand_over(source: Path, target: Path) -> None:
    """Link a file to where it becomes part of an artifact; what is there is replaced."""
    sha256 = _noted(source)
    link_or_copy(source, target)
    if sha256 is not None:
        DIGESTS.note(target, sha256)


def put_noted(store: Store, name: str, path: Path) -> None:
    """Put a file into a store, and then what was said of it, for :func:`refer_to_all`."""
    store.put_file(name, path)
    sha256, status = _noted(path), store.stat(name)
    if sha256 is None or status is None:
        return
    said = {"size": status.size, "modified": status.modified, "sha256": sha256}
    store.put_bytes(str(_beside(PurePosixPath(name))), json.dumps(said).encode())


def _noted(path: Path) -> str | None:
    """The sha256 that was said of this very file."""
    status = path.stat()
    try:
        with open_regular(_beside(path)) as file:
            said = json.loads(file.read())
        known = (said["size"], said["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        return str(said["sha256"]) if known else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def compare(folder: Path, digests: Mapping[str, str]) -> None:
    """Compare files of another stage's artifact with its manifest, in the process that reads them.

    Args:
        folder: of the files.
        digests: their sha256 by name.

    Raises:
        UserError: one is damaged or gone; `where` is its path, by which the driver knows whose artifact it is.
    """
    for name, sha256 in digests.items():
        try:
            found = DIGESTS.of(folder / name)
        except OSError:
            found = ""
        if found != sha256:
            raise UserError(
                "the file differs from the sha256 of its artifact's manifest",
                where=str(folder / name),
                hint="run the pipeline again: damaged artifacts are made again",
            )


def plain_files(folder: Path) -> list[Path]:
    """The files below a folder, without those that this module, or a killed process, left beside them."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _beside(path: PathT) -> PathT:
    """Where the sha256 of a file is said."""
    return path.with_name(f".{path.name}.sha256")


def refer_to_all(store: Store, prefix: str, folder: Path) -> None:
    """Make the objects below a prefix files of an artifact in the making, without their content.

    Those whose sha256 nobody said, as an earlier version did not, are fetched.
    """
    for name in store.list(prefix):
        path = PurePosixPath(name)
        if path.name.startswith("."):
            continue
        target = inside(folder, name.removeprefix(prefix))
        said = _said_of(store, path)
        if said is not None:
            refer(target, said)
            continue
        store.get_file(name, target)
        BYTES.read("checkpoint", target.stat().st_size)


def _said_of(store: Store, path: PurePosixPath) -> StoredObject | None:
    try:
        said = json.loads(store.get_bytes(str(_beside(path))))
        size, modified, sha256 = int(said["size"]), said["modified"], str(said["sha256"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    status = store.stat(str(path))
    known = status is not None and (status.size, status.modified) == (size, modified)
    return StoredObject(str(path), size, sha256) if known and _SHA256.fullmatch(sha256) else None
