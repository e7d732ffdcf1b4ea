"""Records come back out of a store that others can write to: they lead nowhere, and cost at most themselves."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from orchestrator.tracking.backlog import backlog, noted_outage
from orchestrator.tracking.flusher import Flusher, SendProgress, progress
from orchestrator.tracking.mlflow_writer import MlflowWriter, RejectedError, _copy_of
from orchestrator.tracking.spool import Spool


class Sink(MlflowWriter):
    """Takes everything and keeps it, and looks at files' names as the real one does."""

    def __init__(self) -> None:
        super().__init__("sqlite:///none.db", "none")
        self.taken: list[Any] = []

    def open(self, run_id: str, record: Any, known: str | None, parent: str | None) -> str:
        return "m"

    def metrics(self, mlflow_id: str, records: Any) -> None:
        self.taken += [record["step"] for record in records]

    def apply(self, mlflow_id: str, record: Any, files: Path) -> None:
        if record["op"] == "file":
            self.taken.append(_copy_of(record, files)[0])


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def send(spool: Spool) -> list[Any]:
    sink = Sink()
    flusher = Flusher(spool, sink)
    assert flusher.drain(5.0), "nothing holds up the rest"
    flusher.stop(5.0)
    return sink.taken


@pytest.mark.parametrize(
    ("copy", "name"),
    [
        ("..", "x"),
        ("../..", "x"),
        ("{tmp}", "x"),
        ("a", "{tmp}/x"),
        ("a", "../../x"),
        ("", "x"),
        ("a", ""),
    ],
)
def test_a_file_record_neither_uploads_nor_removes_anything_else(
    spool: Spool, tmp_path: Path, copy: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy, name = copy.format(tmp=tmp_path), name.format(tmp=tmp_path)
    (tmp_path / "x").write_text("precious")
    spool.post("run", "open", name="run", parent=None)
    spool.post("run", "file", copy=copy, name=name, folder=None)
    spool.append("run", 1, {"loss": 1.0})
    assert send(spool) == [1]
    assert "not an object name" in caplog.text
    assert (tmp_path / "x").read_text() == "precious"
    assert spool.size("run") > 0


def test_a_folder_in_mlflow_is_below_the_runs(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="not an object name"):
        _copy_of({"copy": "a", "name": "b", "folder": "../../other-run"}, tmp_path)


def test_without_a_usable_first_record_the_rest_is_sent(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    spool.post("run", "open", name="run", parent="../../x")
    spool.append("run", 1, {"loss": 1.0})
    spool.append("other", 2, {"loss": 1.0})
    assert sorted(send(spool)) == [1, 2]
    assert caplog.text.count("run other is logged to MLflow without its name, tags and parent") == 1
    assert "run run is" not in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"null", b"[]", b'{"op": 7}', b'{"op": "metrics", "time_ms": 1}', b'{"op": "finish", "time_ms": 1}',
        b'{"op": "metrics", "channel": "train", "step": "x", "metrics": {}, "time_ms": 1}',
        b'{"op": "metrics", "channel": "train", "step": 1, "metrics": {"a": []}, "time_ms": 1}',
        b"\xff\xfe", b"[" * 20_000, b"a\rb", b"",
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_a_line_that_is_no_record_costs_itself_and_is_said_once(
    spool: Spool, line: bytes, last: bool, caplog: pytest.LogCaptureFixture
) -> None:
    spool.post("run", "open", name="run", parent=None)
    for step in (1, 2):
        spool.append("run", step, {"loss": 1.0})
    path = spool.path("run")
    lines = path.read_bytes().splitlines()
    lines.insert(3 if last else 2, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    later = Spool(spool.folder)
    assert [record["step"] for record in later.history("run")] == [1, 2]
    with caplog.at_level(logging.WARNING):
        assert send(later) == [1, 2]
    said = [record for record in caplog.records if "run.jsonl" in record.getMessage()]
    assert len(said) == 1
    assert later.append("run", 3, {"loss": 1.0})


def test_kinds_and_fields_of_later_versions_are_no_damage(spool: Spool) -> None:
    spool.post("run", "open", name="run", parent=None, mood="fine")
    spool.post("run", "dance", steps=3)
    assert [record["op"] for record, _ in spool.read("run")] == ["open", "dance"]


MODEL: dict[str, Any] = {
    "name": "m", "kind": "vit", "folder": None, "texts": {}, "params": {}, "tags": {}, "metrics": {}, "step": 1,
}  # fmt: skip
DATASET = {"name": "photos", "digest": "ab", "uri": "file:///photos", "profile": {}, "used_for": "training"}


@pytest.mark.parametrize("lacking", sorted(set(MODEL) - {"folder"}))
def test_a_model_without_all_its_fields_is_no_record(spool: Spool, lacking: str) -> None:
    spool.post("run", "model", **MODEL)
    spool.post("run", "model", **{name: value for name, value in MODEL.items() if name != lacking})
    spool.post("run", "model", **{**MODEL, lacking: [None]})
    spool.post("run", "model", **{**MODEL, "metrics": {"loss": "low"}})
    spool.post("run", "model", **{**MODEL, "folder": 7})
    assert [record["op"] for record, _ in spool.read("run")] == ["model"]


@pytest.mark.parametrize("lacking", [*DATASET])
def test_data_sets_without_all_their_fields_are_no_record(spool: Spool, lacking: str) -> None:
    spool.post("run", "datasets", datasets=[DATASET])
    spool.post("run", "datasets")
    spool.post("run", "datasets", datasets={"photos": DATASET})
    spool.post("run", "datasets", datasets=[DATASET, "photos"])
    spool.post("run", "datasets", datasets=[{name: DATASET[name] for name in DATASET if name != lacking}])
    spool.post("run", "datasets", datasets=[DATASET, {**DATASET, lacking: None}])
    assert [record["op"] for record, _ in spool.read("run")] == ["datasets"]


def test_a_run_that_is_opened_with_odd_tags_is_not_opened(spool: Spool) -> None:
    spool.post("run", "open", name="run", parent=None, tags=["a"])
    assert spool.read("run") == []


@pytest.mark.parametrize(
    ("folder", "texts"),
    [
        ("{tmp}/precious", {}),
        ("{tmp}/store/artifacts/../../precious", {}),
        ("{tmp}/store/artifacts/link", {}),
        ("{tmp}", {}),
        (None, {"../escaped": "x"}),
        (None, {"{tmp}/escaped": "x"}),
        (None, {"a/b": "x"}),
        (None, {"..": "x"}),
        (None, {"": "x"}),
        (None, {"a": 7}),
    ],
)
def test_a_model_record_neither_uploads_nor_writes_anything_else(
    uri: str, spool: Spool, tmp_path: Path, folder: str | None, texts: dict[str, Any],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary" / "deeper"))
    for name in ("precious", "store/artifacts/a", "temporary/deeper"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "precious" / "key").write_text("precious")
    (tmp_path / "store" / "artifacts" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "store" / "artifacts" / "a" / "config.json").write_text("{}")
    folder = folder and folder.format(tmp=tmp_path)
    texts = {name.format(tmp=tmp_path): text for name, text in texts.items()}
    spool.post("run", "open", name="run", parent=None)
    spool.post("run", "model", **{**MODEL, "name": "hostile", "folder": folder, "texts": texts})
    good = {"folder": f"{tmp_path}/store/artifacts/a", "texts": {"MLmodel": "flavors: {}"}}
    spool.post("run", "model", **{**MODEL, "name": "good", **good})
    spool.post("run", "model", **{**MODEL, "name": "elsewhere", "folder": f"{tmp_path}/{'gone' * 100}"})
    sink = MlflowWriter(uri, "food", artifacts=tmp_path / "store" / "artifacts")
    flusher = Flusher(spool, sink)
    assert flusher.drain(60.0), "nothing holds up the rest"
    flusher.stop(5.0)

    assert "a record of kind 'model' is left out: " in caplog.text
    assert "MLflow refuses" not in caplog.text
    kept = sorted(path.name for path in (tmp_path / "runs" / "mlartifacts").rglob("*") if path.is_file())
    assert kept == ["MLmodel", "config.json"]
    assert not list(tmp_path.rglob("escaped"))
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("food")
    assert experiment is not None
    models = client.search_logged_models([experiment.experiment_id])
    assert {model.name: str(model.status) for model in models} == {"good": "READY", "elsewhere": "READY"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"mlflow_run_id": "m", "offset": 7, "mood": "fine"}', SendProgress("m", 7)),
        ('{"mlflow_run_id": "m", "offset": -7}', SendProgress()),
        ('{"mlflow_run_id": 3, "offset": 7}', SendProgress()),
        ('{"mlflow_run_id": "", "offset": 7}', SendProgress()),
        ('{"mlflow_run_id": "m", "offset": 1000000000}', SendProgress()),
        ("null", SendProgress()),
        ("\x00", SendProgress()),
    ],
)
def test_notes_of_progress(spool: Spool, text: str, found: SendProgress) -> None:
    spool.append("run", 1, {"loss": 1.0})
    (spool.folder / "run.progress").write_text(text)
    assert progress(spool, "run") == found


def test_files_that_are_no_runs_are_left_alone(spool: Spool) -> None:
    spool.append("run", 1, {"loss": 1.0})
    (spool.folder / "not a run!.jsonl").write_text("{}\n")
    assert spool.run_ids() == ["run"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["op", "step", "metrics", "channel", "time_ms", "copy", "name"]),
                inner,
                max_size=6,
            )
        ),
    )
)
def test_no_json_is_too_strange(tmp_path: Path, value: Any) -> None:
    spool = Spool(tmp_path / "fuzz")
    spool.folder.mkdir(exist_ok=True)
    spool.path("run").write_text(json.dumps(value) + "\n")
    spool.history("run")
    spool.children("run")
    spool.open_children("run")


@pytest.mark.heavy
def test_a_status_that_mlflow_does_not_know_holds_up_nothing(
    tmp_path: Path, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/runs.db"
    spool.post("run", "open", name="run", parent=None)
    spool.post("run", "finish", status="EXPLODED")
    spool.append("run", 1, {"loss": 1.0})
    flusher = Flusher(spool, MlflowWriter(uri, "food"))
    assert flusher.drain(60.0)
    flusher.stop(5.0)
    assert "unknown status: 'EXPLODED'" in caplog.text
    (run,) = MlflowClient(uri, uri).search_runs(["1"])
    assert run.data.metrics == {"train/loss": 1.0}


@pytest.mark.parametrize("damage", [b"\0" * 64, b"garbage\n", None])
def test_a_child_of_a_run_without_a_usable_record_is_sent_without_a_parent(
    spool: Spool, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    spool.post("parent", "open", name="parent", parent=None)
    path = spool.path("parent")
    if damage is not None:
        path.write_bytes(damage)
    else:
        path.with_suffix(".progress").write_text(
            json.dumps({"mlflow_run_id": None, "offset": path.stat().st_size})
        )
    spool.post("parent-child", "open", name="child", parent="parent")
    spool.append("parent-child", 7, {"loss": 1.0})
    sink = Sink()
    flusher = Flusher(Spool(spool.folder), sink)
    assert flusher.drain(5.0)
    flusher.stop(5.0)
    assert sink.taken == [7]
    assert f"without its parent: {path} has no record to open it by" in caplog.text


@pytest.mark.parametrize("time_ms", [10**30, 10**400, -1])
def test_a_record_of_no_time_is_none(spool: Spool, time_ms: int) -> None:
    spool.post("run", "open", name="run", parent=None)
    with spool.path("run").open("a") as file:
        file.write(json.dumps({"op": "tags", "tags": {}, "time_ms": time_ms}) + "\n")
    assert [record["op"] for record, _ in Spool(spool.folder).read("run")] == ["open"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", ["run.jsonl", "run.progress", ".outage.json"])
def test_what_is_no_file_in_a_spool_holds_nothing_up(
    spool: Spool, make: Callable[[Path], None], name: str
) -> None:
    spool.post("other", "open", name="other", parent=None)
    make(spool.folder / name)
    later = Spool(spool.folder)
    assert later.read("run") == []
    assert progress(later, "run") == SendProgress()
    assert noted_outage(later) is None
    assert later.children("other") == {}
    waits = backlog(later)
    assert waits is not None
    assert waits.records == 1


@pytest.mark.parametrize(
    "folder",
    [
        "pretrain-k/model",
        "{tmp}/old/artifacts/pretrain-k/model",
        "{tmp}/artifacts/old/artifacts/pretrain-k/model",
    ],
)
@pytest.mark.parametrize("old", ["gone", "there"])
def test_a_model_of_a_store_that_was_moved_is_sent(
    uri: str, spool: Spool, tmp_path: Path, folder: str, old: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Records of version 0.2 have the absolute path of the folder."""
    folder = folder.format(tmp=tmp_path)
    here = tmp_path / "store" / "artifacts" / "pretrain-k" / "model"
    for place in (here, Path(folder)) if old == "there" and folder.startswith("/") else (here,):
        place.mkdir(parents=True)
        (place / "config.json").write_text("here" if place == here else "there")
    spool.post("run", "open", name="run", parent=None)
    spool.post("run", "model", **{**MODEL, "name": "moved", "folder": folder})
    flusher = Flusher(spool, MlflowWriter(uri, "food", artifacts=tmp_path / "store" / "artifacts"))
    assert flusher.drain(60.0)
    flusher.stop(5.0)
    assert flusher.counts.unusable == 0, caplog.text
    (kept,) = (tmp_path / "runs" / "mlartifacts").rglob("config.json")
    assert kept.read_text() == "here"
