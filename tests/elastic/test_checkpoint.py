"""What a checkpoint is worth: torn, altered or uncommitted ones are passed over, and nothing in them is pickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.elastic.checkpoint import latest, prune, verified

from .conftest import RunJob


def test_newest_good_one_is_used_and_files_are_plain(run_job: RunJob, tmp_path: Path) -> None:
    run_job(tmp_path, 2, checkpoint_every_s=1e-6)
    folder = tmp_path / "checkpoints"
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == ["step-00000005", "step-00000006"], "two newest are kept"
    newest = folder / kept[-1]
    assert {path.suffix for path in newest.iterdir()} == {".safetensors", ".json"}
    for path in newest.glob("*.safetensors"):
        header = path.read_bytes()[8:9]
        assert header == b"{", "a safetensors header is JSON"
    saved = latest(folder)
    assert saved is not None
    assert saved.step == 6

    victim = sorted(newest.glob("*.safetensors"))[0]
    whole = victim.read_bytes()
    for damage, said in (
        (whole[:-1], "bytes instead of"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "sha256"),
    ):
        victim.write_bytes(damage)
        with pytest.raises(ValueError, match=said):
            verified(newest)
        older = latest(folder)
        assert older is not None
        assert older.step == 5
    victim.unlink()
    with pytest.raises(ValueError, match="is missing"):
        verified(newest)

    # Training goes on from the older one, and makes the newest anew.
    again = run_job(tmp_path, 1)
    assert list(again["losses"]) == [6]
    assert verified(newest).step == 6


def test_uncommitted_folders_do_not_exist(tmp_path: Path) -> None:
    for step, committed in ((1, True), (2, True), (3, False)):
        path = tmp_path / f"step-{step:08d}"
        path.mkdir()
        (path / "shard.safetensors").write_bytes(b"x")
        if committed:
            (path / "checkpoint.json").write_text(json.dumps({"step": step, "files": {}}))
    saved = latest(tmp_path)
    assert saved is not None
    assert saved.step == 2
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
