"""How long the end of a run waits for MLflow, and what is said of one that takes nothing."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import disk
from orchestrator.tracking import flusher as flusher_module
from orchestrator.tracking.backlog import backlog, noted_outage
from orchestrator.tracking.flusher import Flusher
from orchestrator.tracking.mlflow_writer import MlflowWriter
from orchestrator.tracking.outage import trouble
from orchestrator.tracking.run import Tracking, open_run
from orchestrator.tracking.spool import Record, Spool

SERVER = "http://mlflow:5000"
# Looks of who waits, of 0.02 s and more each: many times as long as anybody here has patience.
MANY = 1000


class Server(MlflowWriter):
    """Takes a record each time `answer` returns; `imports_s` is what MLflow's import takes."""

    def __init__(
        self, answer: Callable[[], Any], imports_s: float = 0.0, upload: int = 0, upload_s: float = 0.0
    ) -> None:
        super().__init__(SERVER, "food")
        self._answer, self._imports_s, self._upload, self._upload_s = answer, imports_s, upload, upload_s

    def prepare(self) -> None:
        time.sleep(self._imports_s)

    def upload_size(self, record: Record, files: Path) -> int:
        return self._upload if record["op"] == "file" else 0

    def open(self, run_id: str, record: Record, known: str | None, parent: str | None) -> str:
        self._answer()
        return "id"

    def metrics(self, mlflow_id: str, records: Any) -> None:
        self._answer()

    def apply(self, mlflow_id: str, record: Record, files: Path) -> None:
        time.sleep(self._upload_s if record["op"] == "file" else 0)
        self._answer()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """Eight records that are sent one by one."""
    spool = Spool(tmp_path / "spool")
    run = open_run(spool, SERVER, "food", None, None)
    for number in range(7):
        run.tags({"number": number})
    return spool


@pytest.fixture
def full_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All disks are full, for those who look."""
    monkeypatch.setattr(disk, "space", lambda path: (0, 40_000_000))


def drained(spool: Spool, sink: MlflowWriter, patience: float) -> tuple[bool, bool]:
    """Whether all was sent, and whether the waiting ended by itself and not after `MANY` looks."""
    looks = itertools.count(1)
    flusher = Flusher(spool, sink)
    done = flusher.drain(patience, lambda: next(looks) < MANY)
    flusher.stop(0.1)
    return done, next(looks) <= MANY


@pytest.mark.heavy
def test_a_slow_server_is_waited_for_while_it_takes_records(spool: Spool) -> None:
    done, _ = drained(spool, Server(lambda: time.sleep(0.3)), patience=0.8)
    assert done


def test_one_that_never_answers_costs_the_patience_once(spool: Spool) -> None:
    hangs = threading.Event()
    done, by_itself = drained(spool, Server(hangs.wait), patience=0.5)
    outage = noted_outage(spool)
    # Only now: the record that hangs would be taken, and the outage over.
    hangs.set()
    assert not done
    assert by_itself
    assert outage is not None
    assert outage.trouble.what == f"MLflow at {SERVER} has not answered for 0 s"


def test_runs_that_wait_for_their_parent_are_no_answer(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    open_run(spool, SERVER, "food", "z", None)
    open_run(spool, SERVER, "pretrain", "a", "z")

    def answer() -> None:
        raise ConnectionRefusedError

    done, by_itself = drained(spool, Server(answer), patience=1)
    assert not done
    assert by_itself


@pytest.mark.heavy
def test_one_that_stops_answering_costs_it_once_too(spool: Spool) -> None:
    hangs = threading.Event()
    answers = iter([None, None, None])

    def answer() -> None:
        try:
            next(answers)
            time.sleep(0.3)
        except StopIteration:
            hangs.wait()

    done, by_itself = drained(spool, Server(answer), patience=1.5)
    waits = backlog(spool)
    # Only now, as above.
    hangs.set()
    assert not done
    assert by_itself
    assert waits is not None
    assert waits.records == 5


def test_the_import_of_mlflow_costs_no_patience(spool: Spool) -> None:
    assert drained(spool, Server(lambda: None, imports_s=0.8), patience=0.3)[0]


def test_a_large_file_may_take_a_second_a_mib(spool: Spool, tmp_path: Path) -> None:
    run = open_run(spool, SERVER, "large", None, None)
    (tmp_path / "large.bin").write_bytes(b"1")
    run.file(tmp_path / "large.bin")
    slow = Server(lambda: None, upload=2 * 2**20, upload_s=1.2)
    assert drained(spool, slow, patience=0.3)[0]


def test_one_that_has_been_away_for_long_is_asked_once_more(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "_HURRIED_S", 0.1)

    def answer() -> None:
        raise ConnectionRefusedError

    looks = itertools.count(1)
    flusher = Flusher(spool, Server(answer))
    assert not flusher.drain(0.5)
    outage = flusher._outage
    assert outage is not None
    flusher._outage = replace(outage, since=outage.since - 3600)
    assert not flusher.drain(600, lambda: next(looks) < MANY)
    assert next(looks) <= MANY, "the patience was not waited for again"
    flusher.stop()


def test_a_night_of_failures_does_not_end_the_sending(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher_module, "_MAX_WAIT_S", 0.02)
    refusals = iter(range(2))

    def answer() -> None:
        if next(refusals, None) is not None:
            raise ConnectionRefusedError

    flusher = Flusher(spool, Server(answer))
    flusher._failures = 1100
    assert flusher.drain(5)
    flusher.stop()


def test_the_waiting_can_be_ended(spool: Spool) -> None:
    hangs, looks = threading.Event(), itertools.count(1)
    flusher = Flusher(spool, Server(hangs.wait))
    assert not flusher.drain(600, lambda: next(looks) < 5)
    hangs.set()
    flusher.stop(0.1)
    assert next(looks) == 6


@pytest.mark.heavy
def test_an_outage_is_said_once_with_its_time_and_its_end(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    away = True

    def answer() -> None:
        if away:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    flusher = Flusher(spool, Server(answer), interval_s=0.05)
    assert not flusher.drain(0.3)
    time.sleep(1.5)
    outage = noted_outage(spool)
    assert outage is not None
    away = False
    assert flusher.drain(10)
    deadline = time.monotonic() + 5
    while noted_outage(spool) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    flusher.stop()
    assert noted_outage(spool) is None
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2
    assert said[0].startswith(f"MLflow at {SERVER} does not answer (connection refused) since ")
    assert said[0].endswith("sent as soon as it answers")
    assert said[1].startswith("tracking works again after ")


@pytest.mark.heavy
def test_a_locked_database_is_no_server(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    holder = sqlite3.connect(path)
    holder.execute("BEGIN EXCLUSIVE")
    tracking = Tracking(uri, "food", tmp_path / "spool")
    run = tracking.run("food")
    run.metrics({"loss": 1.0}, 0)
    deadline = time.monotonic() + 60
    while run.outage() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    outage = run.outage()
    assert outage is not None, caplog.text
    assert outage.trouble.what == f"the tracking database {path} is locked by another program"
    assert "server" not in outage.trouble.cure
    holder.rollback()
    holder.close()
    assert tracking.close(60), caplog.text


@pytest.mark.parametrize(
    ("error", "what", "cure"),
    [
        (sqlite3.OperationalError("database is locked"), "is locked by another program", "fuser"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "cannot be written", "writable"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written", "writable"),
        (sqlite3.OperationalError("database or disk is full"), "is full (", "free some space"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full (", "free some space"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory"),
            "cannot be opened (Not a directory)",
            "folder",
        ),
        (
            sqlite3.DatabaseError("file is not a database"),
            "is not an SQLite database",
            "a copy",
        ),
    ],
)
@pytest.mark.usefixtures("full_disks")
def test_messages_on_sqlite_speak_of_the_file(tmp_path: Path, error: Exception, what: str, cure: str) -> None:
    wrapped = RuntimeError(f"(sqlite3) {error}\n[SQL: INSERT INTO runs]")
    wrapped.__cause__ = error
    for one in (error, wrapped) if not isinstance(error, OSError) else (error,):
        found = trouble(f"sqlite:///{tmp_path}/mlflow.db", one)
        assert str(tmp_path) in found.what
        assert what in found.what
        assert cure in found.cure
        assert "server" not in found.what + found.until + found.cure


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ConnectionRefusedError(), "does not answer (connection refused)"),
        (TimeoutError(), "does not answer (no answer in time)"),
        (
            RuntimeError("HTTPConnectionPool: Max retries exceeded: Connection refused"),
            "(connection refused)",
        ),
        (RuntimeError("INTERNAL_ERROR: it broke"), "answers with an error (INTERNAL_ERROR: it broke)"),
    ],
)
def test_messages_on_a_server_name_it(error: Exception, what: str) -> None:
    found = trouble("http://user:hunter2@mlflow:5000", error)
    assert what in found.what
    assert "mlflow:5000" in found.what
    assert "hunter2" not in found.what + found.cure


def no_progress_noted(number: int) -> Callable[..., int]:
    """In place of `Path.write_bytes`: how far MLflow is cannot be noted, with such an error."""
    real = Path.write_bytes

    def write_bytes(path: Path, *args: Any, **options: Any) -> int:
        if ".progress." in path.name:
            raise OSError(number, os.strerror(number))
        return real(path, *args, **options)

    return write_bytes


@pytest.mark.usefixtures("full_disks")
def test_a_spool_without_room_is_not_the_databases_trouble(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow takes the records, again and again, since how far it is cannot be noted."""
    monkeypatch.setattr(Path, "write_bytes", no_progress_noted(errno.ENOSPC))
    done, by_itself = drained(spool, Server(lambda: None), patience=0.5)
    assert not done
    assert by_itself
    outage = noted_outage(spool)
    assert outage is not None
    assert outage.trouble.what.startswith(f"the disk of {spool.folder} is full (")


@pytest.mark.parametrize("where", ["sqlite:///{}/mlflow.db", SERVER])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_spool_that_cannot_be_written_is_not_mlflows_trouble(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    monkeypatch.setattr(Path, "write_bytes", no_progress_noted(number))
    sink = Server(lambda: None)
    sink.uri = where.format(tmp_path)
    assert not drained(spool, sink, patience=0.5)[0]
    outage = noted_outage(spool)
    assert outage is not None
    why = os.strerror(number)
    assert outage.trouble.what == f"the folder of tracking records {spool.folder} cannot be used ({why})"
    assert str(spool.folder) in outage.trouble.cure


@pytest.mark.usefixtures("full_disks")
def test_lost_records_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    run = open_run(spool, SERVER, "food", None, None)
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr("orchestrator.tracking.spool.os.write", full)
        for step in range(50):
            run.metrics({"loss": 1.0}, step)
    run.metrics({"loss": 1.0}, 50)
    assert len(caplog.records) == 1
    now = time.monotonic()
    monkeypatch.setattr("orchestrator.tracking.spool.time.monotonic", lambda: now + 61)
    run.metrics({"loss": 1.0}, 51)
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "the disk of " in said[0]
    assert "MB free" in said[0]
    assert said[1] == "tracking records are written again; lost: 50"


def test_metrics_go_out_together_and_other_records_at_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    calls: list[list[Any]] = []

    class Sink(Server):
        def open(self, run_id: str, record: Record, known: str | None, parent: str | None) -> str:
            return "m"

        def metrics(self, mlflow_id: str, records: Sequence[Record]) -> None:
            calls.append([record["step"] for record in records])

        def apply(self, mlflow_id: str, record: Record, files: Path) -> None:
            calls.append([record["op"]])

    def until(number: int) -> None:
        deadline = time.monotonic() + 20
        while len(calls) < number:
            assert time.monotonic() < deadline, calls
            time.sleep(0.01)

    flusher = Flusher(spool, Sink(lambda: None), interval_s=0.02, metrics_every_s=1000.0)
    spool.post("run", "open", name="run", parent=None)
    spool.append("run", 1, {"loss": 1.0})
    flusher.start()
    until(1)
    for step in (2, 3):
        spool.append("run", step, {"loss": 1.0})
    time.sleep(0.3)
    assert calls == [[1]]
    spool.post("run", "tags", tags={"a": "b"})
    until(3)
    spool.append("run", 4, {"loss": 1.0})
    assert flusher.drain(20), "whoever waits gets all"
    flusher.stop()
    assert calls == [[1], [2, 3], ["tags"], [4]]
