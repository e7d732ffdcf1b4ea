"""What keeps state on a disk, with every write failing in turn: the old state or the new one, and going on works."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import latest
from disk_faults import KINDS, Disk, Kind, every_fault, goes_through
from PIL import Image

from orchestrator.pipeline.lease.lease_manager import LeaseManager
from orchestrator.pipeline.lease.liveness import Timing
from orchestrator.pipeline.lease.process_identity import ProcessIdentity, this_process
from orchestrator.pipeline.store import spool_backup as backup_module
from orchestrator.pipeline.store.spool_backup import SpoolBackup
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.local import LocalStore
from orchestrator.tracking.spool import Spool
from orchestrator.training.checkpoint.format import COMMIT, part_name, shard_name, step_name
from orchestrator.training.checkpoint.shard_file import TensorSlot, file_header, write_file
from orchestrator.training.checkpoint.storage import CheckpointStorage

each_kind = pytest.mark.parametrize("kind", KINDS)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def odd(folder: Path) -> list[str]:
    """Drafts and halves, which no reader looks at."""
    return [name for name in files(folder) if "partial" in name or name.endswith(".tmp")]


# --- checkpoints ------------------------------------------------------------------------------------------------


class _Kept(LocalStore):
    """A store elsewhere, for those who must not look at its folder."""

    remote = True


def _target(folder: Path, through_store: bool) -> CheckpointStorage:
    store = _Kept(folder / "store") if through_store else None
    return CheckpointStorage(folder / "checkpoints", store, "work/x/checkpoints" if store else "")


def _write(target: CheckpointStorage, token: str, step: int) -> None:
    """What `CheckpointWriter` does, for a group of one worker."""
    data = memoryview(np.full(5, step, np.float32).view(np.uint8)).cast("B")
    header = file_header({"master/w": TensorSlot(0, 5, 0, 5)})
    folder, shard = step_name(step), shard_name(token, 0, 1)
    digest = write_file(target.folder / folder / shard, header, data)["sha256"]
    target.publish(f"{folder}/{shard}")
    entry = {"size": len(header) + data.nbytes, "sha256": digest}
    target.put(f"{folder}/{part_name(token, 0, 1)}", json.dumps(entry).encode())
    manifest: dict[str, Any] = {"format": 2, "step": step, "updates": step, "num_workers": 1, "token": token}
    manifest |= {"keys": {"master/w": 5}, "files": {shard: entry}}
    target.commit(step, token, json.dumps(manifest).encode())
    target.prune(step, token, keep=1, keep_every=None)
    target.forget(step, keep=1)


def _newest(target: CheckpointStorage) -> int | None:
    for step in target.committed():
        saved = target.find(step)
        for name in saved.files:
            target.fetch(saved, name)
        return step
    return None


@each_kind
@pytest.mark.parametrize("through_store", [False, True])
def test_a_checkpoint_is_there_whole_or_the_one_before_it_is(
    tmp_path: Path, kind: Kind, through_store: bool
) -> None:
    for disk in every_fault(kind, at_least=20):
        target = _target(tmp_path / str(disk.fail_at), through_store)
        first = target.acquire()
        _write(target, first, 4)

        def take_over_and_save(target: CheckpointStorage = target) -> None:
            token = target.acquire()
            target.sweep(token)
            _write(target, token, 8)

        went = goes_through(disk, take_over_and_save)
        again = _target(tmp_path / str(disk.fail_at), through_store)
        assert _newest(again) in ([8] if went else [4, 8]), f"after write {disk.fail_at}"
        # The next group takes over, clears away what the one before left, and goes on.
        token = again.acquire()
        again.sweep(token)
        _write(again, token, 12)
        assert _newest(again) == 12
        top = (
            again.folder
            if not through_store
            else again.folder.parent / "store" / "work" / "x" / "checkpoints"
        )
        left = [
            name for name in files(top) if not name.startswith(f"{step_name(12)}/") and name != "owner.json"
        ]
        drafts = [name for name in left if Path(name).parent == Path()]
        assert set(left) - set(drafts) == set(), f"never cleared, after write {disk.fail_at}"
        assert len(drafts) <= 1, "a draft of the owner's record goes with the folder"
        if not through_store:
            found = latest(again.folder)
            assert found is not None
            assert found.step == 12
            assert (again.folder / step_name(12) / COMMIT).is_file()


# --- holds ------------------------------------------------------------------------------------------------------


def _dead() -> ProcessIdentity:
    """A process of this machine that is gone."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as child:
        pid = child.pid
    return this_process().model_copy(update={"pid": pid, "started": 1})


def _leases(store: LocalStore, who: ProcessIdentity) -> LeaseManager:
    # Nobody sends a heartbeat while the disk is failing: the numbers of writes would be other ones each time.
    return LeaseManager(store, Timing(heartbeat_s=1000.0, timeout_s=3000.0), who)


def _hold(leases: LeaseManager) -> int:
    with leases.hold("it", "thing", above=0) as lease:
        lease.check()
        return lease.epoch


@each_kind
def test_a_hold_that_fails_halfway_is_nobodys(tmp_path: Path, kind: Kind) -> None:
    # After a crash the process is gone; after anything else it is there, and wants the hold again.
    for disk in every_fault(kind, at_least=12):
        store = LocalStore(tmp_path / str(disk.fail_at))
        before = _hold(_leases(store, this_process()))
        leases = _leases(store, _dead() if kind == "crash" else this_process())
        epochs: list[int] = []
        goes_through(disk, lambda: epochs.append(_hold(leases)))  # noqa: B023
        later = _hold(leases if kind != "crash" else _leases(LocalStore(store.root), this_process()))
        assert later > max([before, *epochs]), f"after write {disk.fail_at}"
        left = [name for name in store.list("holds/") if name.endswith((".door", ".ticket"))]
        assert left == [], f"after write {disk.fail_at}"


# --- tracking ---------------------------------------------------------------------------------------------------


@each_kind
def test_a_record_is_whole_or_absent_and_is_recorded_again(tmp_path: Path, kind: Kind) -> None:
    for disk in every_fault(kind, at_least=4):
        folder = tmp_path / str(disk.fail_at)
        spool = Spool(folder)
        spool.post("run", "open", name="x", parent=None)

        def appends(spool: Spool = spool) -> None:
            for step in range(3):
                spool.append("run", step, {"loss": 1.0})

        went = goes_through(disk, appends)
        read = [record["step"] for record in Spool(folder).history("run")]
        assert read == list(range(len(read)))
        assert len(read) == 3 or not went
        appends(spool if kind != "crash" else Spool(folder))
        assert [record["step"] for record in Spool(folder).history("run")] == [0, 1, 2]
        assert all(json.loads(line) for line in Spool(folder).path("run").read_bytes().splitlines())


@each_kind
def test_the_backup_is_never_ahead_of_itself(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_module, "_PIECE", 200)
    for disk in every_fault(kind, at_least=20):
        folder = tmp_path / str(disk.fail_at)
        store = LocalStore(folder / "store")
        spool = Spool(folder / "mine")
        spool_backup = SpoolBackup(store, "spool/toy/", folder / "mine")
        spool.post("run", "open", name="x", parent=None)
        for step in range(4):
            spool.append("run", step, {"loss": 1.0})
        assert spool_backup.flush()
        for step in range(4, 9):
            spool.append("run", step, {"loss": 1.0})
        # As the flusher does when MLflow has all of it.
        spool.path("run").with_suffix(".progress").write_text(json.dumps({"offset": spool.size("run")}))
        flushed: list[bool] = []
        goes_through(disk, lambda: flushed.append(spool_backup.flush()))  # noqa: B023
        there = folder / "there"
        SpoolBackup(store, "spool/toy/", there).restore()
        steps = [record["step"] for record in Spool(there).history("run")]
        assert steps == list(range(len(steps)))
        assert len(steps) == 9 or flushed != [True]
        assert len(steps) >= 4
        progress = there / "run.progress"
        said = json.loads(progress.read_text())["offset"] if progress.exists() else 0
        assert said <= Spool(there).size("run"), f"ahead of the records, after write {disk.fail_at}"
        again = (
            spool_backup
            if kind != "crash"
            else SpoolBackup(LocalStore(store.root), "spool/toy/", folder / "mine")
        )
        assert again.flush()
        whole = folder / "whole"
        SpoolBackup(store, "spool/toy/", whole).restore()
        assert files(whole) == files(folder / "mine")
        assert odd(whole) == []


@each_kind
def test_a_backup_that_comes_back_halfway_comes_back_the_next_time(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_module, "_PIECE", 200)
    store = LocalStore(tmp_path / "store")
    spool = Spool(tmp_path / "mine")
    spool.post("run", "open", name="x", parent=None)
    for step in range(9):
        spool.append("run", step, {"loss": 1.0})
    (spool.files("run") / "c0ffee").mkdir(parents=True)
    (spool.files("run") / "c0ffee" / "picture.png").write_bytes(bytes(500))
    spool.path("run").with_suffix(".progress").write_text(json.dumps({"offset": 10}))
    assert SpoolBackup(store, "spool/toy/", spool.folder).flush()
    for disk in every_fault(kind, at_least=6):
        there = tmp_path / "there" / str(disk.fail_at)
        goes_through(disk, lambda: SpoolBackup(store, "spool/toy/", there).restore())  # noqa: B023
        SpoolBackup(store, "spool/toy/", there).restore()
        assert files(there) == files(spool.folder), f"after write {disk.fail_at}"
        assert all((there / name).read_bytes() == (spool.folder / name).read_bytes() for name in files(there))


# --- what stages write ------------------------------------------------------------------------------------------


def _attempt(root: Path, kind: str, write: Callable[[Path], object]) -> None:
    """What an attempt does with a stage's output: it writes into a folder of its own, which is published whole."""
    artifacts = ArtifactStore(LocalStore(root))
    out = artifacts.staging(kind)
    write(out)
    artifacts.publish(kind, "0" * 64, out)


def _never_half(root: Path, disk: Disk, kind: str, write: Callable[[Path], object]) -> None:
    went = goes_through(disk, lambda: _attempt(root, kind, write))
    found = ArtifactStore(LocalStore(root)).intact(kind, "0" * 64)
    assert found is not None or not went
    names = sorted(found.manifest.files) if found is not None else None
    _attempt(root, kind, write)
    again = ArtifactStore(LocalStore(root)).intact(kind, "0" * 64)
    assert again is not None
    assert names in (None, sorted(again.manifest.files)), f"after write {disk.fail_at}"
    assert ArtifactStore(LocalStore(root)).examine(f"artifacts/{kind}-{'0' * 16}/") == []


@each_kind
def test_a_report_is_published_whole_or_not_at_all(tmp_path: Path, kind: Kind) -> None:
    from orchestrator.evaluation.report.html import Section, Table, Text, Tile, markdown_table, page

    sections = [Section("Scores", [Text("All of them."), Table(("a", "b"), [("x", "1")], num_names=1)])]

    def write(out: Path) -> None:
        (out / "table.json").write_text(json.dumps({"rows": [1, 2]}))
        (out / "table.md").write_text("\n".join(markdown_table(Table(("a", "b"), [("x", "1")], num_names=1))))
        (out / "report.html").write_text(page("t", "s", [Tile("photos", "3")], sections))

    for disk in every_fault(kind, at_least=14):
        _never_half(tmp_path / str(disk.fail_at), disk, "evaluate", write)


@pytest.mark.parametrize("kind", ["once"])
def test_a_curation_is_published_whole_or_not_at_all(tmp_path: Path, kind: Kind) -> None:
    from orchestrator.config.elastic import Elastic
    from orchestrator.config.schema import DataSource
    from orchestrator.stages.base import Context
    from orchestrator.stages.curate.config import Curate
    from orchestrator.tracking.run import NullRun

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(photos / f"{number}.png")
    stage = Curate(kind="curate", data="photos", clusters=2, sample=4)

    def write(out: Path) -> None:
        run: Any = NullRun()
        sources = {"photos": DataSource(path=photos)}
        stage.run(
            Context(
                name="curate", pipeline="toy", seed=0, key="k", inputs={}, keys={}, sources=sources, out=out,
                work=tmp_path / "work", elastic=Elastic(), run=run,
            )
        )  # fmt: skip

    for disk in every_fault(kind, at_least=20):
        _never_half(tmp_path / str(disk.fail_at), disk, "curate", write)


@each_kind
def test_exported_weights_are_whole_or_the_old_ones(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from orchestrator.training import export
    from orchestrator.training.checkpoint import partition
    from orchestrator.training.checkpoint.partition import Shard

    alone = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1, barrier=lambda: None)
    monkeypatch.setattr(export, "dist", alone)
    monkeypatch.setattr(partition, "dist", alone)
    for disk in every_fault(kind, at_least=4):
        path = tmp_path / str(disk.fail_at) / "ema.safetensors"

        def write(step: int, path: Path = path) -> None:
            shard = Shard("w", torch.full((9,), float(step)), 0, 9, torch.Size((9,)))
            engine: Any = SimpleNamespace(average=lambda: [shard])
            export.export_ema(engine, path, step)

        write(1)
        went = goes_through(disk, lambda: write(2))
        assert float(export.load_export(path)["w"][0]) in ([2.0] if went else [1.0, 2.0])
        write(3)
        assert float(export.load_export(path)["w"][0]) == 3.0
        assert odd(path.parent) == []


def test_the_disk_of_these_tests_fails_where_it_should(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "a").write_bytes(b"1234")
        fd = os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT)
        with contextlib.closing(SimpleNamespace(close=lambda: os.close(fd))):
            os.write(fd, b"1234")

    counts = {(disk.fail_at, goes_through(disk, write), *files(tmp_path)) for disk in every_fault("once", 4)}
    assert len(counts) == 5
    assert [went for _, went, *_ in sorted(counts)] == [False] * 4 + [True]
