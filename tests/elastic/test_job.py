"""What a job hands on when it is done."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_job

from orchestrator.training.checkpoint.format import COMMIT, FORMAT


def test_what_another_group_left_beside_the_last_checkpoint_is_not_handed_on(tmp_path: Path) -> None:
    """Its workers were killed after they wrote their files and before the manifest was."""
    job = tiny_job(tmp_path / "job", 4, 1)
    ours = "a0002/shard-00001-of-00001.safetensors"
    for name in ("a0001/shard-00001-of-00002.safetensors", ours):
        file = job.final_checkpoint / name
        file.parent.mkdir(parents=True)
        file.write_bytes(name.encode())
    manifest = {"format": FORMAT, "step": 4, "updates": 4, "num_workers": 1, "token": "a0002", "keys": {}}
    (job.final_checkpoint / COMMIT).write_text(
        json.dumps({**manifest, "files": {ours: {"size": len(ours), "sha256": ""}}})
    )
    job.collect(tmp_path / "out")
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    assert files == [ours, COMMIT]
    assert (tmp_path / "out" / ours).read_bytes() == ours.encode()


def test_a_job_whose_last_checkpoint_is_damaged_is_not_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = tiny_job(tmp_path / "job", 4, 1)
    shard = "a0001/shard-00001-of-00001.safetensors"
    (job.final_checkpoint / shard).parent.mkdir(parents=True)
    (job.final_checkpoint / shard).write_bytes(b"shard")
    job.export(4).parent.mkdir()
    job.export(4).write_bytes(b"ema")
    assert not job.is_done()
    entry = {"size": 5, "sha256": hashlib.sha256(b"shard").hexdigest()}
    manifest = {"format": FORMAT, "step": 4, "updates": 4, "num_workers": 1, "token": "a0001", "keys": {}}
    (job.final_checkpoint / COMMIT).write_text(json.dumps({**manifest, "files": {shard: entry}}))
    assert job.is_done()
    (job.final_checkpoint / shard).write_bytes(b"shart")
    assert not job.is_done()
    assert shard in caplog.text
