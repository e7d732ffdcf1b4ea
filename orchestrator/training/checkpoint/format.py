"""What a committed checkpoint is: names, manifest, and the checks that tell a good one from a damaged one.

    step-00000040/checkpoint.json                              the manifest; a checkpoint exists when it does
    step-00000040/a0007/shard-00001-of-00004.safetensors       one file a worker, below the group's token
    step-00000040/a0007/part-00001-of-00004.json               that file's size and sha256, for the manifest

Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import open_regular, sha256_of
from orchestrator.training.skipped_updates import Skips

FORMAT = 2
COMMIT = "checkpoint.json"
# Above any count of steps or workers, and still exact as a float.
_MOST = 2**53
TOKEN = re.compile(r"[a-z]\d+")
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or used; says which file and why."""


class LaterFormatError(CheckpointError):
    """A later version of this program wrote the checkpoint. It is not damaged, and must not be passed over."""


@dataclass(frozen=True)
class CheckpointManifest:
    """A committed checkpoint: its local folder (files may still have to be fetched into it) and its manifest."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps of the stage done, skipped updates included."""
        return int(self.meta["step"])

    @property
    def world(self) -> int:
        """How many workers wrote it."""
        return int(self.meta["num_workers"])

    @property
    def token(self) -> str:
        """The group of workers that wrote it."""
        return str(self.meta["token"])

    @property
    def keys(self) -> dict[str, int]:
        """Elements of each saved tensor."""
        return dict(self.meta["keys"])

    @property
    def state(self) -> dict[str, float]:
        """The task's own numbers."""
        return {str(name): float(value) for name, value in self.meta.get("state", {}).items()}

    @property
    def skips(self) -> Skips:
        """Updates that were skipped in its stage."""
        return Skips.of(self.meta.get("skipped"))

    @property
    def unreadable(self) -> set[int]:
        """Rows of photos that could not be read in its stage; none if it was written by an earlier version."""
        rows = self.meta.get("unreadable")
        return {row for row in rows if isinstance(row, int)} if isinstance(rows, list) else set()

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Relative name → size in bytes and sha256."""
        return dict(self.meta["files"])

    def shard(self, rank: int) -> str:
        """Relative name of what worker `rank` of `world` wrote."""
        return shard_name(self.token, rank, self.world)


def step_name(step: int) -> str:
    """The folder of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a name below a folder of checkpoints, or None if it belongs to no checkpoint."""
    match = _STEP.fullmatch(name.split("/", 1)[0])
    return int(match[1]) if match else None


def shard_name(token: str, rank: int, world: int) -> str:
    """Where worker `rank` of `world` writes its shards, relative to the checkpoint."""
    return f"{token}/shard-{rank + 1:05d}-of-{world:05d}.safetensors"


def part_name(token: str, rank: int, world: int) -> str:
    """Where worker `rank` of `world` says what it wrote, relative to the checkpoint."""
    return f"{token}/part-{rank + 1:05d}-of-{world:05d}.json"


def parse(text: str | bytes, path: Path) -> CheckpointManifest:
    """The checkpoint whose manifest reads `text`.

    Raises:
        CheckpointError: it is not a manifest of this format.
        LaterFormatError: a later version of this program wrote it.
    """
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{COMMIT} is not JSON: {error}") from error
    written = meta.get("format") if isinstance(meta, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise LaterFormatError(f"{COMMIT} has format {written}; this version reads format {FORMAT}")
    if not isinstance(meta, dict) or written != FORMAT:
        found = meta.get("format", 1) if isinstance(meta, dict) else "none"
        raise CheckpointError(f"{COMMIT} has format {found}; this version reads format {FORMAT}")
    expected = {"step": int, "updates": int, "num_workers": int, "token": str, "keys": dict, "files": dict}
    wrong = [name for name, kind in expected.items() if not isinstance(meta.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{COMMIT} has no valid {', '.join(wrong)}")
    # bool is an int, and JSON has true.
    counts = {"step": 0, "updates": 0, "num_workers": 1}
    wrong = [name for name, least in counts.items() if not least <= meta[name] <= _MOST or meta[name] is True]
    if wrong:
        raise CheckpointError(f"{COMMIT} has no valid {', '.join(wrong)}")
    manifest = CheckpointManifest(path, meta)
    # Names are made, not taken from the file: one that leads elsewhere must never be opened or fetched.
    if (
        not TOKEN.fullmatch(manifest.token)
        or len(manifest.files) != manifest.world
        or set(manifest.files) != set(map(manifest.shard, range(manifest.world)))
    ):
        raise CheckpointError(f"{COMMIT} lists other files than {manifest.world} workers write")
    state = meta.get("state", {})
    if not isinstance(state, dict) or not all(isinstance(value, int | float) for value in state.values()):
        raise CheckpointError(f"{COMMIT} has no valid state")
    # What is only shown: `meta` and `versions` of earlier versions may be missing.
    wrong = [name for name in ("meta", "versions") if not isinstance(meta.get(name, {}), dict)]
    if wrong:
        raise CheckpointError(f"{COMMIT} has no valid {', '.join(wrong)}")
    entries = manifest.files.items()
    unusable = sorted(name for name, entry in entries if not _is_entry(entry)) + sorted(
        key for key, numel in manifest.keys.items() if not isinstance(numel, int) or numel < 0
    )
    if unusable:
        raise CheckpointError(f"{COMMIT} has no valid entry for {unusable[0]}")
    return manifest


def _is_entry(entry: object) -> bool:
    """Whether it says the size and sha256 of a file."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
    )


def _digest(file: Path) -> str:
    digest = sha256_of(file)
    BYTES.read("checkpoint", file.stat().st_size)
    return digest


def problem(file: Path, entry: Mapping[str, Any], digest_of: Callable[[Path], str] = _digest) -> str | None:
    """What is wrong with `file`, which should have `entry`'s size and sha256; None if nothing is."""
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes instead of {entry['size']}"
        digest = digest_of(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == entry["sha256"] else "differs from its sha256"


def read(path: Path) -> CheckpointManifest:
    """The checkpoint in folder `path`, by its manifest alone.

    Raises:
        CheckpointError: it is not committed, or its manifest cannot be used.
    """
    try:
        with open_regular(path / COMMIT) as file:
            return parse(file.read(), path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError("it was never committed") from None
    except OSError as error:
        raise CheckpointError(f"{COMMIT} cannot be read: {error.strerror}") from error


def verified(path: Path, digest_of: Callable[[Path], str] = _digest) -> CheckpointManifest:
    """The checkpoint in folder `path`, every byte of it checked.

    Args:
        path: its folder.
        digest_of: the sha256 of a file; of an artifact's files :meth:`~orchestrator.fsio.Digests.of` knows it.

    Raises:
        CheckpointError: it is not committed, or a file's size or sha256 differs; says which.
    """
    manifest = read(path)
    for name, entry in manifest.files.items():
        wrong = problem(path / name, entry, digest_of)
        if wrong:
            raise CheckpointError(f"{name} {wrong}")
    return manifest
