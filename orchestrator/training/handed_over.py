"""Files that a worker writes and the driver links into an artifact, with their sha256: nobody reads them for that.

Beside such a file lies `.<name>.sha256` with what the worker said. It holds for the very file: one with another size or
time of last change is read and hashed as any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from orchestrator.byte_counts import BYTES
from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS, atomic_write, link_or_copy, open_regular, sha256_of


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
    status = source.stat()
    link_or_copy(source, target)
    try:
        with open_regular(_beside(source)) as file:
            said = json.loads(file.read())
        if (said["size"], said["mtime_ns"]) == (status.st_size, status.st_mtime_ns):
            DIGESTS.note(target, str(said["sha256"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return


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


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")
