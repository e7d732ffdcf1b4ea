"""What is in a checkpoint, and whether it is whole. No torch here: it must also run where nothing is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import disk
from orchestrator.errors import UserError
from orchestrator.training.checkpoint import format as form
from orchestrator.training.checkpoint.format import COMMIT, CheckpointError, step_of
from orchestrator.training.skipped_updates import Skips


@dataclass(frozen=True)
class Kind:
    """All saved tensors of one kind (`master`, `exp_avg`, …): how many, and their elements."""

    name: str
    tensors: int
    elements: int


@dataclass(frozen=True)
class FileState:
    """One file: its size in bytes as it should be, and what is wrong with it, None if nothing."""

    name: str
    size: int
    problem: str | None


@dataclass(frozen=True)
class Description:
    """One checkpoint. Without a usable manifest there is only `path` and `problem`.

    Attributes:
        problem: why it cannot be used, None if it can.
        step: steps of its stage that were done, those with a skipped update included.
        updates: all updates since the weights were made, earlier stages' included.
        skips: updates that were skipped in its stage.
        token: of the group of workers that wrote it.
        created: when, in ISO 8601, UTC.
        meta: what else the manifest says (job, seed, number of steps).
    """

    path: Path
    problem: str | None
    step: int | None = None
    updates: int = 0
    skips: Skips = field(default_factory=Skips)
    workers: int = 0
    token: str = ""
    created: str = ""
    kinds: tuple[Kind, ...] = ()
    files: tuple[FileState, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all its files as they should be."""
        return sum(file.size for file in self.files)


def describe(path: Path) -> Description:
    """The checkpoint in folder `path`; reads and hashes every file of it."""
    try:
        manifest = form.read(path)
    except CheckpointError as error:
        return Description(path, str(error), step_of(path.name))
    files = tuple(
        FileState(name, entry["size"], form.problem(path / name, entry))
        for name, entry in sorted(manifest.files.items())
    )
    bad = [file for file in files if file.problem]
    tensors, elements = Counter[str](), Counter[str]()
    for key, numel in manifest.keys.items():
        kind = key.split("/", 1)[0]
        tensors[kind] += 1
        elements[kind] += numel
    return Description(
        path,
        f"{bad[0].name} {bad[0].problem}" if bad else None,
        manifest.step,
        updates=int(manifest.meta["updates"]),
        skips=manifest.skips,
        workers=manifest.world,
        token=manifest.token,
        created=str(manifest.meta.get("created", "")),
        kinds=tuple(Kind(name, count, elements[name]) for name, count in tensors.items()),
        files=files,
        meta=manifest.meta.get("meta", {}),
        versions=manifest.meta.get("versions", {}),
    )


def describe_all(path: Path) -> list[Description]:
    """The checkpoint in `path`, or all those in the folder `path`, oldest first.

    Raises:
        UserError: there is none, or no folder can have this name.
    """
    path = disk.named(path)
    if (path / COMMIT).exists() or (step_of(path.name) is not None and path.is_dir()):
        return [describe(path)]
    found = {one: step for one in path.glob("step-*") if (step := step_of(one.name)) is not None}
    if not found:
        raise UserError(
            f"there is no checkpoint in {path}",
            where=str(path),
            hint=f"name a folder with a {COMMIT}, or one that holds step-… folders",
        )
    return [describe(one) for one in sorted(found, key=lambda one: found[one])]
