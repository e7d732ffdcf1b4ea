"""Files of an artifact in the making that are objects of its store already: the store copies them, nobody moves them.

Where such a file would be lies a small record of the object, `.<name>.stored-object`. `ArtifactStore.publish` reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

_RECORD = ".stored-object"


@dataclass(frozen=True)
class StoredObject:
    """An object of the store: its name there, its size in bytes, and the sha256 that who wrote it computed, in hex."""

    name: str
    size: int
    sha256: str


def refer(path: Path, stored: StoredObject) -> None:
    """Make an object of the store a file of an artifact in the making, by its record. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _record(path).write_text(json.dumps(asdict(stored)), encoding="utf-8")


def is_there(path: Path) -> bool:
    """Whether an artifact in the making has such a file, as a file or by its record, or such a folder."""
    return path.exists() or _record(path).exists()


def is_record(path: Path) -> bool:
    """Whether it is a record of an object rather than a file of the artifact."""
    return path.name.startswith(".") and path.name.endswith(_RECORD)


def references_in(folder: Path) -> dict[str, StoredObject]:
    """The objects that are files of an artifact in the making, by the names of these files in it."""
    found = {}
    for record in sorted(path for path in folder.rglob(f".*{_RECORD}") if is_record(path)):
        path = record.with_name(record.name.removeprefix(".").removesuffix(_RECORD))
        stored = StoredObject(**json.loads(record.read_text(encoding="utf-8")))
        found[path.relative_to(folder).as_posix()] = stored
    return found


def _record(path: Path) -> Path:
    return path.with_name(f".{path.name}{_RECORD}")
