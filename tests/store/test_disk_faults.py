"""A commit that fails at any of its writes leaves the artifact absent or whole, and is simply done again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from disk_faults import Crash, Disk

from orchestrator.store.artifact import ArtifactStore
from orchestrator.store.local import LocalStore

KEY = "0123456789abcdef" * 4
FILES = {"config.json": b"{}", "model/a.safetensors": b"a" * 1000, "model/b.safetensors": b"b" * 10}


def staged(artifacts: ArtifactStore, files: dict[str, bytes] = FILES) -> Path:
    folder = artifacts.staging("pretrain")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def commit(root: Path, disk: Disk, *, over_damage: bool) -> bool:
    """Whether it went through."""
    artifacts = ArtifactStore(LocalStore(root))
    if over_damage:
        made = artifacts.publish("pretrain", KEY, staged(artifacts, FILES | {"old": b"old"}))
        (made.path / "config.json").write_bytes(b"[]")
    folder = staged(artifacts)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        try:
            artifacts.publish("pretrain", KEY, folder)
        except (OSError, Crash):
            return False
    return True


def contents(artifacts: ArtifactStore) -> dict[str, bytes] | None:
    found = artifacts.intact("pretrain", KEY)
    if found is None:
        return None
    for name, entry in found.manifest.files.items():
        assert hashlib.sha256((found.path / name).read_bytes()).hexdigest() == entry.sha256
    return {name: (found.path / name).read_bytes() for name in found.manifest.files}


@pytest.mark.parametrize("over_damage", [False, True])
@pytest.mark.parametrize("crash", [False, True])
def test_an_artifact_is_absent_or_whole_whichever_write_fails(
    tmp_path: Path, crash: bool, over_damage: bool
) -> None:
    number = 0
    while True:
        number += 1
        root, disk = tmp_path / str(number), Disk(number, crash=crash)
        went = commit(root, disk, over_damage=over_damage)
        artifacts = ArtifactStore(LocalStore(root))
        assert contents(artifacts) in ([FILES] if went else [None, FILES]), f"after write {number}"
        artifacts.publish("pretrain", KEY, staged(artifacts))
        assert contents(artifacts) == FILES, f"done again after write {number}"
        assert artifacts.examine(f"artifacts/pretrain-{KEY[:16]}/") == []
        if not disk.failed:
            break
    assert number > 10, "the faults must have been where things are written"
