"""Whatever fails at any of its writes happened or did not, leaves nothing behind, and is simply done again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from disk_faults import KINDS, Kind, every_fault, goes_through

from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.local import LocalStore

KEY = "0123456789abcdef" * 4
FILES = {"config.json": b"{}", "model/a.safetensors": b"a" * 1000, "model/b.safetensors": b"b" * 10}


def staged(artifacts: ArtifactStore, files: dict[str, bytes] = FILES) -> Path:
    folder = artifacts.staging("pretrain")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def contents(artifacts: ArtifactStore) -> dict[str, bytes] | None:
    found = artifacts.intact("pretrain", KEY)
    if found is None:
        return None
    for name, entry in found.manifest.files.items():
        assert hashlib.sha256((found.path / name).read_bytes()).hexdigest() == entry.sha256
    return {name: (found.path / name).read_bytes() for name in found.manifest.files}


def end_of_process(store: LocalStore) -> None:
    """What the kernel does then: it drops the lock on the scratch folder."""
    fd = store._scratch._fd
    if fd is not None:
        os.close(fd)
        store._scratch._fd = store._scratch._folder = None


def litter(root: Path) -> list[str]:
    """Files in the store that are not objects, after whoever comes next has opened it."""
    store = LocalStore(root)
    scratch = [path.relative_to(root).as_posix() for path in (root / ".scratch").rglob("*")]
    return scratch + [
        name for name in store.list() if "partial" in name or name.rpartition("/")[2].startswith(".")
    ]


@pytest.mark.parametrize("over_damage", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_absent_or_whole_whichever_write_fails(
    tmp_path: Path, kind: Kind, over_damage: bool
) -> None:
    for disk in every_fault(kind, at_least=12):
        root = tmp_path / str(disk.fail_at)
        artifacts = ArtifactStore(LocalStore(root))
        if over_damage:
            made = artifacts.publish("pretrain", KEY, staged(artifacts, FILES | {"old": b"old"}))
            (made.path / "config.json").write_bytes(b"[]")
        folder = staged(artifacts)
        went = goes_through(disk, lambda: artifacts.publish("pretrain", KEY, folder))  # noqa: B023
        end_of_process(artifacts.store)
        assert litter(root) == []
        artifacts = ArtifactStore(LocalStore(root))
        assert contents(artifacts) in ([FILES] if went else [None, FILES]), f"after write {disk.fail_at}"
        artifacts.publish("pretrain", KEY, staged(artifacts))
        assert contents(artifacts) == FILES, f"done again after write {disk.fail_at}"
        assert artifacts.examine(f"artifacts/pretrain-{KEY[:16]}/") == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_is_the_old_or_the_new_one(tmp_path: Path, kind: Kind) -> None:
    for disk in every_fault(kind, at_least=6):
        root = tmp_path / str(disk.fail_at)
        store = LocalStore(root)
        store.put_bytes("a/one", b"old")
        (tmp_path / "source").write_bytes(b"new")

        def puts(store: LocalStore = store) -> None:
            store.put_bytes("a/one", b"new")
            store.put_file("b/two", tmp_path / "source")
            store.get_file("a/one", tmp_path / "out" / "copy")

        went = goes_through(disk, puts)
        if kind != "crash":
            assert [
                path for path in (root / ".scratch").rglob("*") if path.is_file() and path.suffix != ".lock"
            ] == []
            assert list(tmp_path.glob("out/.*")) == []
        end_of_process(store)
        assert litter(root) == []
        assert store.get_bytes("a/one") in ([b"new"] if went else [b"old", b"new"])
        assert not store.stat("b/two") or store.get_bytes("b/two") == b"new"
        puts(LocalStore(root))
        assert LocalStore(root).get_bytes("b/two") == b"new"


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_dead_left_goes_though_the_first_try_fails(tmp_path: Path, kind: Kind) -> None:
    for disk in every_fault(kind, at_least=4):
        root = tmp_path / str(disk.fail_at)
        dead = LocalStore(root)
        (dead.scratch("work") / "deep").mkdir(parents=True)
        (dead.scratch("half")).write_bytes(b"x")
        end_of_process(dead)
        opened: list[LocalStore] = []
        if goes_through(disk, lambda: opened.append(LocalStore(root))):  # noqa: B023
            end_of_process(opened[0])
        assert litter(root) == [], f"after write {disk.fail_at}"
