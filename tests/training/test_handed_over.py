"""What a worker wrote is linked into an artifact with the sha256 that it said, and read where that does not hold."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "elastic"))
from tiny import tiny_job

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import DIGESTS
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.local import LocalStore
from orchestrator.training.handed_over import hand_over, note
from orchestrator.training.job import Job

WEIGHTS = b"w" * 1_000_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def counted(before: dict[str, int]) -> dict[str, int]:
    return {
        name.removeprefix("driver_"): value - before[name]
        for name, value in BYTES.metrics().items()
        if value != before[name]
    }


def make_model(data: bytes, export: Path, folder: Path) -> None:
    assert export.read_bytes() == WEIGHTS
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(data)


def finished_job(folder: Path) -> Job:
    job = replace(tiny_job(folder, 4, 1), finish=partial(make_model, b"m" * 500_000))
    job.export(4).parent.mkdir(parents=True)
    job.export(4).write_bytes(WEIGHTS)
    note(job.export(4), sha256(WEIGHTS))
    return job


def test_the_driver_publishes_what_workers_wrote_without_reading_it(tmp_path: Path) -> None:
    job = finished_job(tmp_path / "job")
    job.publish(4)
    artifacts = ArtifactStore(LocalStore(tmp_path / "store"))
    out = artifacts.staging("out")
    before = BYTES.metrics()
    job.collect_exports(out / "snapshots")
    job.collect_finished(out)
    (out / "recipe.json").write_text("{}")
    made = artifacts.publish("pretrain", "0" * 64, out)
    # The record, and the manifest that was looked for.
    assert counted(before) == {"artifact_bytes_read": 2, "artifact_bytes_written": 2}
    assert {name: entry.sha256 for name, entry in made.manifest.files.items()} == {
        "snapshots/step-00000004.safetensors": sha256(WEIGHTS),
        "model/model.safetensors": sha256(b"m" * 500_000),
        "recipe.json": sha256(b"{}"),
    }
    assert (made.path / "snapshots/step-00000004.safetensors").samefile(job.export(4))

    # Linked on, from artifact to artifact: nothing is written, and the folder that nobody reads is not compared.
    DIGESTS._known.clear()
    before = BYTES.metrics()
    artifacts.fetch(made, uncompared=("snapshots",))
    assert counted(before) == {"artifact_bytes_read": 500_000 + 2}
    (made.path / "snapshots/step-00000004.safetensors").write_bytes(WEIGHTS[:-1])
    with pytest.raises(Exception, match="999999 bytes, should be 1000000"):
        artifacts.fetch(made, uncompared=("snapshots",))


def test_what_changed_since_it_was_said_is_read(tmp_path: Path) -> None:
    source = tmp_path / "export"
    source.write_bytes(b"one")
    note(source, sha256(b"one"))
    source.write_bytes(b"two")
    os.utime(source, ns=(1, 1))
    hand_over(source, tmp_path / "linked")
    assert DIGESTS.of(tmp_path / "linked") == sha256(b"two")
    (tmp_path / ".export.sha256").write_text("[]")
    hand_over(source, tmp_path / "again")
    assert DIGESTS.of(tmp_path / "again") == sha256(b"two")


def test_a_job_is_done_once_its_model_is_made_and_elsewhere_it_is_fetched(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    job = replace(finished_job(tmp_path / "here"), remote=(store, "work/job/"))
    job.finished.mkdir()  # a killed worker's, from before it was made whole
    (job.finished / "torn").write_bytes(b"")
    job.publish(4)
    assert sorted(store.list("work/job/")) == [
        "work/job/exports/.step-00000004.safetensors.sha256",
        "work/job/exports/step-00000004.safetensors",
        "work/job/finished/model/.model.safetensors.sha256",
        "work/job/finished/model/model.safetensors",
    ]
    there = replace(job, work=tmp_path / "there")
    assert not there.is_done()
    store.put_bytes("work/job/checkpoints/step-00000004/checkpoint.json", b"{}")
    assert there.is_done()
    local = replace(job, remote=None)
    assert not local.is_done()


SHARD = b"s" * 300_000


def kept_elsewhere(tmp_path: Path) -> tuple[LocalStore, Job]:
    """A job that another machine finished: all of it is in the store."""
    store = LocalStore(tmp_path / "store")
    job = replace(finished_job(tmp_path / "here"), remote=(store, "work/job/"))
    job.publish(4)
    shard = "a0001/shard-00001-of-00001.safetensors"
    manifest = {
        "format": 2,
        "step": 4,
        "updates": 4,
        "num_workers": 1,
        "token": "a0001",
        "keys": {"master/w": 5},
    }
    files = {shard: {"size": len(SHARD), "sha256": sha256(SHARD)}}
    store.put_bytes(f"work/job/checkpoints/step-00000004/{shard}", SHARD)
    text = json.dumps({**manifest, "files": files})
    store.put_bytes("work/job/checkpoints/step-00000004/checkpoint.json", text.encode())
    return store, replace(job, work=tmp_path / "there")


def test_what_a_job_keeps_in_a_store_is_published_without_its_content(tmp_path: Path) -> None:
    store, job = kept_elsewhere(tmp_path)
    assert job.is_done()
    artifacts = ArtifactStore(store)
    out = artifacts.staging("out")
    before = BYTES.metrics()
    job.collect_exports(out / "snapshots")
    job.collect_finished(out)
    job.collect(out / "checkpoint")
    made = artifacts.publish("pretrain", "0" * 64, out)
    assert all(value < 3000 for value in counted(before).values())
    assert {name: entry.sha256 for name, entry in made.manifest.files.items()} == {
        "snapshots/step-00000004.safetensors": sha256(WEIGHTS),
        "model/model.safetensors": sha256(b"m" * 500_000),
        "checkpoint/a0001/shard-00001-of-00001.safetensors": sha256(SHARD),
        "checkpoint/checkpoint.json": sha256((made.path / "checkpoint/checkpoint.json").read_bytes()),
    }
    DIGESTS._known.clear()
    artifacts.fetch(made)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "said",
    [
        None,
        b"[]",
        b'{"size": 1000000, "mtime_ns": 1, "sha256": "0"}',
        b'{"size": 3, "modified": 1.0, "sha256": "x"}',
    ],
)
def test_what_nobody_said_the_sha256_of_is_fetched(tmp_path: Path, said: bytes | None) -> None:
    store, job = kept_elsewhere(tmp_path)
    beside = "work/job/exports/.step-00000004.safetensors.sha256"
    store.delete(beside)
    if said is not None:
        store.put_bytes(beside, said)
    before = BYTES.metrics()
    job.collect_exports(tmp_path / "snapshots")
    assert counted(before) == {"checkpoint_bytes_read": len(WEIGHTS)}
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00000004.safetensors"]


def test_what_another_worker_has_put_there_since_is_no_longer_what_was_said(tmp_path: Path) -> None:
    store, job = kept_elsewhere(tmp_path)
    other = b"o" * len(WEIGHTS)
    store.put_bytes("work/job/exports/step-00000004.safetensors", other)
    artifacts = ArtifactStore(store)
    out = artifacts.staging("out")
    job.collect_exports(out / "snapshots")
    made = artifacts.publish("pretrain", "0" * 64, out)
    assert made.manifest.files["snapshots/step-00000004.safetensors"].sha256 == sha256(other)


def test_what_was_said_of_an_earlier_file_is_not_put_beside_the_next(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    job = replace(finished_job(tmp_path / "here"), remote=(store, "work/job/"))
    other = b"o" * len(WEIGHTS)
    job.export(4).write_bytes(other)
    os.utime(job.export(4), ns=(1, 1))
    replace(job, finish=None).publish(4)
    job.collect_exports(tmp_path / "snapshots")
    assert (tmp_path / "snapshots/step-00000004.safetensors").read_bytes() == other


def test_one_export_is_brought_to_this_machine(tmp_path: Path) -> None:
    _, job = kept_elsewhere(tmp_path)
    assert job.fetch_export(4).read_bytes() == WEIGHTS
    assert job.fetch_export(4).is_relative_to(tmp_path / "there")
    with pytest.raises(FileNotFoundError):
        job.fetch_export(2)
    local = replace(job, work=tmp_path / "here", remote=None)
    assert local.fetch_export(4) == tmp_path / "here/exports/step-00000004.safetensors"


def test_each_part_of_publishing_a_large_model_is_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two words of it at most one file is made, read or sent: a group that says nothing is restarted."""
    store = LocalStore(tmp_path / "store")
    told: list[str] = []
    put = store.put_file

    def sent(name: str, path: Path) -> None:
        told.append(name)
        put(name, path)

    monkeypatch.setattr(store, "put_file", sent)
    job = replace(finished_job(tmp_path / "job"), remote=(store, ""))
    job.publish(4, lambda: told.append("progress"))
    finished, export = "finished/model/model.safetensors", "exports/step-00000004.safetensors"
    assert told == ["progress", "progress", finished, "progress", export, "progress"]


def test_a_job_whose_last_export_is_there_and_whose_model_is_not_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.training.job._is_whole", lambda checkpoint: True)
    job = finished_job(tmp_path / "job")
    assert not job.is_done()
    job.publish(4)
    assert job.is_done()
    assert replace(finished_job(tmp_path / "other"), finish=None).is_done()
