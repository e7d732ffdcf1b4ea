"""Records that MLflow cannot have, or not yet: they hold up no others, and it is said how many they are."""

from __future__ import annotations

import io
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.pipeline.load import load
from orchestrator.pipeline.tracking import tracking_run
from orchestrator.pipeline.tracking.sync import sync
from orchestrator.tracking.backlog import pending
from orchestrator.tracking.flusher import Counts, Flusher
from orchestrator.tracking.mlflow_writer import MlflowWriter, RejectedError, UnknownRecordError
from orchestrator.tracking.run import Tracking
from orchestrator.tracking.spool import Spool


class Sink(MlflowWriter):
    """Takes what it can, refuses records that say so, and has no place for files as long as `away` is set."""

    def __init__(self, away: threading.Event | None = None) -> None:
        super().__init__("sqlite:///none.db", "none")
        self.away = away or threading.Event()
        self.taken: list[Any] = []
        self.uploads = 0

    def open(self, run_id: str, record: Any, known: str | None, parent: str | None) -> str:
        return f"mlflow-{run_id}"

    def metrics(self, mlflow_id: str, records: Any) -> None:
        if any(record["step"] < 0 for record in records):
            raise RejectedError("a negative step")
        self.taken += [(mlflow_id, record["step"]) for record in records]

    def apply(self, mlflow_id: str, record: Any, files: Path) -> None:
        if record["op"] == "dance":
            raise UnknownRecordError("this version does not know records of kind 'dance'")
        if record["op"] == "file":
            self.uploads += 1
            if self.away.is_set():
                raise ConnectionError("the bucket does not answer")
            self.taken.append((mlflow_id, record["name"]))


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.mark.parametrize("tail", [b"\0" * 64, b'{"op": "met', b"\0" * 64 + b'{"op"'])
def test_a_line_without_an_end_is_not_waited_for(spool: Spool, tail: bytes) -> None:
    spool.post("run", "open", name="run", parent=None)
    spool.append("run", 1, {"loss": 1.0})
    whole = spool.size("run")
    with spool.path("run").open("ab") as file:
        file.write(tail)
    sink = Sink()
    flusher = Flusher(Spool(spool.folder), sink)
    assert flusher.drain(60.0)
    flusher.stop(5.0)
    assert pending(spool) == 0
    assert spool.size("run") == whole
    assert sink.taken == [("mlflow-run", 1)]
    assert spool.append("run", 2, {"loss": 1.0})


def test_damage_is_told_once_by_all_spools_of_a_process(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    spool.post("run", "open", name="run", parent=None)
    with spool.path("run").open("ab") as file:
        file.write(b"garbage\n")
    for _ in range(3):
        Spool(spool.folder).read("run")
    assert caplog.text.count("is damaged before byte") == 1


def test_what_is_refused_or_not_known_is_not_counted_as_sent(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    spool.post("run", "open", name="run", parent=None)
    for step in (1, -1, -2, 2):
        spool.append("run", step, {"loss": 1.0})
    spool.post("run", "dance", steps=3)
    spool.post("run", "dance", steps=4)
    sink = Sink()
    flusher = Flusher(spool, sink)
    assert flusher.drain(5.0)
    flusher.stop(5.0)
    assert flusher.counts == Counts(sent=3, refused=2, unknown=2)
    assert caplog.text.count("run run: MLflow refuses a record of kind 'metrics': a negative step") == 1
    assert caplog.text.count("a record is skipped: this version does not know records of kind 'dance'") == 1


def test_an_upload_that_fails_holds_up_its_own_run_only(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    for run in ("a", "b"):
        spool.post(run, "open", name=run, parent=None)
        spool.post(run, "file", name="page.html", copy="1", folder=None)
        spool.append(run, 1, {"loss": 1.0})
    away = threading.Event()
    sink = Sink(away)
    real = sink.apply

    def apply(mlflow_id: str, record: Any, files: Path) -> None:
        away.set() if mlflow_id == "mlflow-a" and not back.is_set() else away.clear()
        real(mlflow_id, record, files)

    back = threading.Event()
    sink.apply = apply  # type: ignore[method-assign]
    flusher = Flusher(spool, sink, interval_s=0.01, metrics_every_s=0.0)
    with caplog.at_level(logging.WARNING):
        assert not flusher.drain(1.5)
        assert sink.taken == [("mlflow-b", "page.html"), ("mlflow-b", 1)]
        spool.append("b", 2, {"loss": 1.0})
        assert not flusher.drain(1.5)
        assert ("mlflow-b", 2) in sink.taken
        back.set()
        assert flusher.drain(30.0)
    flusher.stop(5.0)
    assert sink.taken[-2:] == [("mlflow-a", "page.html"), ("mlflow-a", 1)]
    assert caplog.text.count("the tracking records of run a are kept in") == 1
    assert caplog.text.count("tracking works again") == 1


def test_an_outage_that_grows_from_one_run_to_all_is_told_again(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    flusher = Flusher(spool, Sink())
    with caplog.at_level(logging.WARNING):
        for run in ("a", "a", None, None, "a", "b"):
            flusher._failed(ConnectionError("away"), run)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "the tracking records of run a are kept in" in said[0]
    assert ": tracking records are kept in" in said[1]


def test_records_of_a_batch_that_fails_in_the_middle_are_counted_once(spool: Spool) -> None:
    spool.post("run", "open", name="run", parent=None)
    for step in (-1, -2, 1, 2):
        spool.append("run", step, {"loss": 1.0})
    sink = Sink()
    real, failures = sink.metrics, [ConnectionError("away"), ConnectionError("away")]

    def metrics(mlflow_id: str, records: Any) -> None:
        if len(records) == 1 and records[0]["step"] == 2 and failures:
            raise failures.pop()
        real(mlflow_id, records)

    sink.metrics = metrics  # type: ignore[method-assign]
    flusher = Flusher(spool, sink, interval_s=0.01, metrics_every_s=0.0)
    assert flusher.drain(30.0)
    flusher.stop(5.0)
    assert flusher.counts == Counts(sent=3, refused=2)


PIPELINE = """\
name: toy
store: runs/
tracking: {uri: "sqlite:///runs/mlflow.db"}
stages:
  curate: {kind: curate, data: photos}
data: {photos: {path: photos}}
"""


@pytest.mark.parametrize(
    ("steps", "dances", "said"),
    [
        ([1, 2], 0, "✓ Sent 3 tracking records to the tracking database {db}; nothing waits."),
        (
            [1, -1],
            0,
            "! Sent 2 tracking records to the tracking database {db}; MLflow refused 1; nothing waits.",
        ),
        (
            [1, -1],
            2,
            "! Sent 2 tracking records to the tracking database {db}; MLflow refused 1; 2 skipped, of a kind that "
            "this version does not know; nothing waits.",
        ),
    ],
)
def test_sync_says_what_became_of_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int], dances: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(PIPELINE)
    spool = Spool(tmp_path / "runs" / "spool" / "toy")
    spool.post("run", "open", name="run", parent=None)
    for step in steps:
        spool.append("run", step, {"loss": 1.0})
    for _ in range(dances):
        spool.post("run", "dance")
    with spool.path("run").open("ab") as file:
        file.write(b"\0" * 64)

    def tracking(*_: object) -> Tracking:
        made = Tracking.__new__(Tracking)
        made._flusher = Flusher(Spool(spool.folder), Sink())
        return made

    monkeypatch.setattr(tracking_run, "_tracking", tracking)
    output = io.StringIO()
    loaded = load("toy.yaml", needs_data=False, gather=True)
    assert sync(Console(file=output, width=500), loaded, patience=30.0)
    assert said.format(db=tmp_path / "runs" / "mlflow.db") in output.getvalue()
