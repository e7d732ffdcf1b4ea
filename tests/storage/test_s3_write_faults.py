"""A store on S3 with every request that changes something failing in turn: the old state or the new one, no halves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3_faults import KINDS, Kind, every_fault, goes_through

from orchestrator.pipeline.keys.cache_key import KeyParts
from orchestrator.pipeline.lease.lease_manager import LeaseManager
from orchestrator.pipeline.lease.liveness import Timing
from orchestrator.pipeline.lease.process_identity import this_process
from orchestrator.pipeline.store import spool_backup as mirror_module
from orchestrator.pipeline.store.ledger import Ledger
from orchestrator.pipeline.store.spool_backup import SpoolBackup
from orchestrator.storage import s3 as s3_module
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.s3 import S3Store
from orchestrator.tracking.spool import Spool
from orchestrator.training.checkpoint.format import part_name, shard_name, step_name
from orchestrator.training.checkpoint.shard_file import TensorSlot, file_header, write_file
from orchestrator.training.checkpoint.storage import CheckpointStorage

KEY = "0123456789abcdef" * 4
PARTS = KeyParts(kind="pretrain", config={"lr": 0.1})
# The least that S3 takes for a part that is not the last.
PART = 5 * 2**20

# What `refused` leaves, `away` leaves, too, but for what is cleared up after it.
each_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "refused" else kind for kind in KINDS]
)


class Fence:
    epoch = 1

    def check(self) -> None:
        pass


def place(uri: str, number: int) -> S3Store:
    return S3Store(f"{uri}/{number}")


@each_kind
def test_an_artifact_is_absent_or_whole(
    s3_uri: str, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "PART", PART)
    files = {"config.json": b"{}", "model/a.safetensors": bytes(PART + 1)}

    def publish(artifacts: ArtifactStore) -> None:
        folder = artifacts.staging("pretrain")
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        artifacts.publish("pretrain", KEY, folder)

    for server in every_fault(kind, at_least=7):
        store = place(s3_uri, server.fail_at)
        went = goes_through(server, lambda: publish(ArtifactStore(store)))  # noqa: B023
        found = ArtifactStore(place(s3_uri, server.fail_at)).intact("pretrain", KEY)
        assert found is not None or not went, server.done
        publish(ArtifactStore(store))
        again = ArtifactStore(place(s3_uri, server.fail_at))
        assert again.examine(f"artifacts/pretrain-{KEY[:16]}/") == []
        made = again.intact("pretrain", KEY)
        assert made is not None
        assert {name: (made.path / name).read_bytes() for name in files} == files
        store.abort_abandoned(older_than_s=0.0)
        left = s3_client_uploads(store)
        assert left == [], "parts of uploads are given up"


def s3_client_uploads(store: S3Store) -> list[str]:
    with store._using("list uploads") as client:
        pages = client.get_paginator("list_multipart_uploads").paginate(
            Bucket=store.bucket, Prefix=store._prefix
        )
        return [upload["Key"] for page in pages for upload in page.get("Uploads", ())]


@each_kind
def test_an_event_is_on_record_or_not_and_never_overwritten(s3_uri: str, kind: Kind) -> None:
    for server in every_fault(kind, at_least=1):
        store = place(s3_uri, server.fail_at)
        book = Ledger(store, "toy", Fence())
        book.append("opened", run_id="r")
        went = goes_through(
            server,
            lambda: book.append("running", stage="a", parts=PARTS, run_id="x"),  # noqa: B023
        )
        read = Ledger(store, "toy").state.stages
        assert "a" in read or not went
        book.append("running", stage="b", parts=PARTS, run_id="y")
        again = Ledger(place(s3_uri, server.fail_at), "toy")
        assert ("a" in again.state.stages) == ("a" in read), "an event that was there has gone"
        assert again.state.stages["b"].state == "running"
        assert again.unreadable == []


@each_kind
def test_a_hold_that_fails_halfway_is_nobodys(s3_uri: str, kind: Kind) -> None:
    for server in every_fault(kind, at_least=6):
        store = place(s3_uri, server.fail_at)
        # Nobody sends a heartbeat while the server is failing: the numbers of requests would be other ones each time.
        leases = LeaseManager(store, Timing(heartbeat_s=1000.0, timeout_s=3000.0), this_process())
        epochs = [0]

        def hold(leases: LeaseManager = leases, epochs: list[int] = epochs) -> None:
            with leases.hold("it", "thing", above=0) as lease:
                lease.check()
                epochs.append(lease.epoch)

        goes_through(server, hold)
        before = max(epochs)
        hold()
        assert epochs[-1] > before, server.done
        assert [name for name in store.list("holds/") if name.endswith((".door", ".ticket"))] == [], (
            server.done
        )


def save(target: CheckpointStorage, token: str, step: int) -> None:
    """What `CheckpointWriter` does, for a group of one worker."""
    data = memoryview(np.full(5, step, np.float32).view(np.uint8)).cast("B")
    header = file_header({"master/w": TensorSlot(0, 5, 0, 5)})
    folder, shard = step_name(step), shard_name(token, 0, 1)
    entry = {
        "size": len(header) + data.nbytes,
        "sha256": write_file(target.folder / folder / shard, header, data)["sha256"],
    }
    target.publish(f"{folder}/{shard}")
    target.put(f"{folder}/{part_name(token, 0, 1)}", json.dumps(entry).encode())
    manifest: dict[str, Any] = {"format": 2, "step": step, "updates": step, "num_workers": 1, "token": token}
    manifest |= {"keys": {"master/w": 5}, "files": {shard: entry}}
    target.commit(step, token, json.dumps(manifest).encode())
    target.prune(step, token, keep=1, keep_every=None)


@each_kind
def test_a_checkpoint_is_there_whole_or_the_one_before_it_is(s3_uri: str, tmp_path: Path, kind: Kind) -> None:
    for server in every_fault(kind, at_least=6):
        store, mine = place(s3_uri, server.fail_at), tmp_path / str(server.fail_at)
        target = CheckpointStorage(mine, store, "work/x/checkpoints")
        save(target, target.acquire(), 4)

        def take_over_and_save(target: CheckpointStorage = target) -> None:
            token = target.acquire()
            target.sweep(token)
            save(target, token, 8)

        went = goes_through(server, take_over_and_save)
        again = CheckpointStorage(mine / "elsewhere", store, "work/x/checkpoints")
        newest = again.committed()[0]
        assert newest in ([8] if went else [4, 8]), server.done
        assert again.whole(newest).step == newest
        token = again.acquire()
        again.sweep(token)
        save(again, token, 12)
        assert again.committed() == [12]
        names = [name.removeprefix("work/x/checkpoints/") for name in store.list("work/x/checkpoints/")]
        assert [name for name in names if not name.startswith(f"{step_name(12)}/")] == ["owner.json"], (
            server.done
        )


@each_kind
def test_the_mirror_is_never_ahead_of_itself(
    s3_uri: str, tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_PIECE", 200)
    for server in every_fault(kind, at_least=3):
        store, folder = place(s3_uri, server.fail_at), tmp_path / str(server.fail_at)
        spool, spool_backup = Spool(folder), SpoolBackup(store, "spool/toy/", folder)
        spool.post("run", "open", name="x", parent=None)
        spool.append("run", 0, {"loss": 1.0})
        assert spool_backup.flush()
        for step in range(1, 5):
            spool.append("run", step, {"loss": 1.0})
        spool.path("run").with_suffix(".progress").write_text(json.dumps({"offset": spool.size("run")}))
        flushed: list[bool] = []
        assert goes_through(server, lambda: flushed.append(spool_backup.flush()))  # noqa: B023
        assert flushed == [not server.failed]
        there = tmp_path / f"there-{server.fail_at}"
        SpoolBackup(store, "spool/toy/", there).restore()
        steps = [record["step"] for record in Spool(there).history("run")]
        assert steps == list(range(len(steps)))
        assert len(steps) == (5 if flushed == [True] else len(steps))
        progress = there / "run.progress"
        said = json.loads(progress.read_text())["offset"] if progress.exists() else 0
        assert said <= Spool(there).size("run")
        assert spool_backup.flush()
        whole = tmp_path / f"whole-{server.fail_at}"
        SpoolBackup(store, "spool/toy/", whole).restore()
        assert len(Spool(whole).history("run")) == 5
