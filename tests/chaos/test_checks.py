"""A check that cannot fail proves nothing: what a storm must not leave behind is found if it does."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos import checks
from chaos.scene import MARK


@pytest.fixture
def orphan(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    process = subprocess.Popen(command, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield mark, process
    process.kill()
    process.communicate()


def test_a_process_that_is_left_is_found_and_one_that_ended_is_not(
    orphan: tuple[str, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_GONE_S", 0.0)
    mark, process = orphan
    (found,) = checks.orphans(mark)
    assert f"process {process.pid} is left" in found
    process.kill()
    process.wait()
    assert checks.orphans(mark) == []


def test_shared_memory_that_nobody_holds_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_SHM", tmp_path)
    before = checks.shared_memory()
    held, leaked = tmp_path / "held", tmp_path / "leaked"
    leaked.touch()
    with held.open("w"):
        assert checks.leaked_memory(before) == [f"shared memory is left: {leaked}"]
    leaked.unlink()
    held.unlink()
    assert checks.leaked_memory(before) == []


class Bucket(checks.Objects):
    """Objects that are not in any store."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self._objects = objects

    def names(self, below: str = "") -> list[str]:
        return sorted(name for name in self._objects if name.startswith(below))

    def get(self, name: str) -> bytes:
        return self._objects[name]


GOOD = {
    "artifacts/curate-1/manifest.json": b'{"files": {"a": {"size": 1, "sha256": '
    b'"ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}}}',
    "artifacts/curate-1/a": b"a",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"artifacts/curate-1/a": b"b"}, "is damaged"),
        ({"artifacts/curate-1/b": b"b"}, "the files differ from the manifest's: ['b']"),
        ({"artifacts/pretrain-2/a": b"a"}, "pretrain-2 has no manifest"),
    ],
)
def test_an_artifact_that_is_not_whole_is_found(change: dict[str, bytes], message: str | None) -> None:
    wrong = checks.artifacts(Bucket({**GOOD, **change}))
    assert len(wrong) == (message is not None)
    assert all(message is not None and message in one for one in wrong)


def events(*happened: str) -> Bucket:
    return Bucket(
        {f"ledger/storm/{number:08d}-00000001.json": text.encode() for number, text in enumerate(happened)}
    )


OPENED, CLOSED = '{"event": "opened"}', '{"event": "closed", "status": "FINISHED"}'
RUNNING, DONE = '{"event": "running", "stage": "a"}', '{"event": "done", "stage": "a"}'


@pytest.mark.parametrize(
    ("happened", "message"),
    [
        ((OPENED, RUNNING, DONE, CLOSED), None),
        ((OPENED, RUNNING, OPENED, RUNNING, DONE, CLOSED), None),
        ((OPENED, RUNNING, DONE), "ends with"),
        ((OPENED, RUNNING, RUNNING, DONE, CLOSED), "started while a was running"),
        ((OPENED, RUNNING, DONE, DONE, CLOSED), "done 2 times"),
        ((OPENED, RUNNING, CLOSED), "done 0 times"),
        ((OPENED, OPENED, OPENED, RUNNING, DONE, CLOSED), "opened 3 times by 2 drivers"),
    ],
)
def test_a_ledger_that_does_not_add_up_is_found(happened: tuple[str, ...], message: str | None) -> None:
    _, wrong = checks.ledger(events(*happened), {"stages": {"a": {}}}, starts=2)
    assert len(wrong) == (message is not None)
    assert all(message is not None and message in one for one in wrong)


def test_a_missing_event_is_found() -> None:
    bucket = events(OPENED, RUNNING, DONE, OPENED, CLOSED)
    del bucket._objects["ledger/storm/00000003-00000001.json"]
    _, wrong = checks.ledger(bucket, {"stages": {"a": {}}}, starts=2)
    assert wrong == ["ledger: its events are numbered [0, 1, 2, 4]"]
