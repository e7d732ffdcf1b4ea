from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestrator.errors import UserError
from orchestrator.tracking.flusher import SendProgress
from orchestrator.tracking.mlflow_writer import MlflowWriter
from orchestrator.tracking.run import NullRun, Run, Tracking, open_run
from orchestrator.tracking.spool import Spool

Start = Callable[[], Tracking]


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def mlflow_id(run: Run) -> str:
    found = run.mlflow_run_id(timeout=10)
    assert found is not None
    return found


def rows(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(mlflow_id(run), name)]


def test_runs_nest_and_carry_what_they_were_told(start: Start, client: MlflowClient, tmp_path: Path) -> None:
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    with start() as tracking:
        pipeline = tracking.run("food")
        stage = pipeline.child("pretrain")
        stage.params({"config": {"lr": 1e-3, "crops": (2, 8)}})
        stage.tags({"key": "abc"})
        assert stage.metrics({"loss": 1.5, "bad name!": math.nan}, step=3)
        stage.file(picture, "pictures")
        picture.unlink()
        stage.finish("FINISHED")
        pipeline.finish("FAILED")

    run = client.get_run(mlflow_id(stage))
    assert run.info.run_name == "pretrain"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"config.lr": "0.001", "config.crops": "[2, 8]"}
    assert run.data.tags["key"] == "abc"
    assert run.data.tags["mlflow.parentRunId"] == mlflow_id(pipeline)
    assert run.data.tags["orchestrator.run_id"] == stage.run_id
    assert rows(client, stage, "train/loss") == [(3, 1.5)]
    assert math.isnan(rows(client, stage, "train/bad name_")[0][1])
    assert client.get_run(mlflow_id(pipeline)).info.status == "FAILED"
    assert [file.path for file in client.list_artifacts(mlflow_id(stage), "pictures")] == [
        "pictures/picture.txt"
    ]
    assert list((tmp_path / "spool").glob("*.files/*")) == [], "uploaded copies are removed"


def test_resumed_run_is_the_same_run_and_counts_no_step_twice(start: Start, client: MlflowClient) -> None:
    with start() as tracking:
        pipeline = tracking.run("food")
        stage = pipeline.child("pretrain")
        stage.params({"lr": 1, "dim": 4})
        for step in range(5):
            stage.metrics({"loss": 10.0 + step}, step)
        stage.finish("FAILED")
    with start() as tracking:
        again = tracking.run("food", resume_id=pipeline.run_id).child("pretrain", resume_id=stage.run_id)
        assert mlflow_id(again) == mlflow_id(stage)
        again.params({"lr": 2, "dim": 4, "new": "x"})
        assert [again.metrics({"loss": 20.0 + step}, step) for step in range(3, 7)] == [
            False,
            False,
            True,
            True,
        ]
        assert tracking.drain(10)
        run = client.get_run(mlflow_id(stage))
        assert run.info.status == "RUNNING"

    assert run.data.params == {"lr": "1", "dim": "4", "new": "x"}
    assert run.data.tags["drift.lr"] == "2"
    assert "drift.dim" not in run.data.tags
    assert rows(client, stage, "train/loss") == [
        (0, 10.0), (1, 11.0), (2, 12.0), (3, 13.0), (4, 14.0), (5, 25.0), (6, 26.0),
    ]  # fmt: skip
    assert [record["step"] for record in again.history()] == list(range(7))
    assert len(client.search_runs([run.info.experiment_id])) == 2


@pytest.mark.parametrize("lost", ["everything", "offset"])
def test_sending_twice_doubles_nothing(start: Start, client: MlflowClient, lost: str) -> None:
    with start() as tracking:
        run = tracking.run("food")
        for step in range(20):
            run.metrics({"loss": step / 3, "none": math.nan, "huge": math.inf}, step)
    before = mlflow_id(run)
    # As if the process had died between MLflow's commit and its note of that, here in mid-batch.
    spool = tracking._spool
    middle = spool.read(run.run_id)[8][1]
    tracking._flusher._note(
        run.run_id, SendProgress() if lost == "everything" else SendProgress(before, middle)
    )
    run.metrics({"loss": 1.0, "none": 0.0}, 20)
    assert start().close()

    assert mlflow_id(run) == before
    assert len(client.search_runs([client.get_run(before).info.experiment_id])) == 1
    assert [step for step, _ in rows(client, run, "train/loss")] == list(range(21))
    assert [step for step, _ in rows(client, run, "train/none")] == list(range(21))
    assert [step for step, _ in rows(client, run, "train/huge")] == list(range(20))


def test_killed_between_mlflows_commit_and_the_note(
    start: Start, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    code = f"""
import os, signal
from pathlib import Path
from orchestrator.tracking import run as runs
from orchestrator.tracking.mlflow_writer import MlflowWriter
class Dies(MlflowWriter):
    def metrics(self, *args):
        super().metrics(*args)
        os.kill(os.getpid(), signal.SIGKILL)
runs.MlflowWriter = Dies
tracking = runs.Tracking({uri!r}, "food", Path({str(tmp_path / "spool")!r}))
run = tracking.run("food")
print(run.run_id, flush=True)
for step in range(10):
    run.metrics({{"loss": step}}, step)
tracking.drain(30)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tracking = start()
    run = tracking.run("food", resume_id=done.stdout.strip())
    assert not run.metrics({"loss": -1.0}, 9)
    assert run.metrics({"loss": 10.0}, 10)
    assert tracking.close()
    assert sorted(rows(client, run, "train/loss")) == [(step, float(step)) for step in range(11)]


def test_an_outage_costs_nothing_but_time(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, prepare = threading.Event(), MlflowWriter.prepare

    def late(sink: MlflowWriter) -> None:
        assert recorded.wait(60), "who records waits for MLflow"
        prepare(sink)

    monkeypatch.setattr(MlflowWriter, "prepare", late)
    folder = tmp_path / "away"
    folder.touch()  # a file where the database's folder should be
    tracking = Tracking(f"sqlite:///{folder}/mlflow.db", "food", tmp_path / "spool")
    run = tracking.run("food").child("pretrain")
    for step in range(3):
        assert run.metrics({"loss": step}, step)
    recorded.set()
    assert not tracking.drain(0.5)
    assert run.mlflow_run_id() is None
    # Another test's flusher may still be trying.
    ours = [record for record in caplog.records if str(tmp_path) in record.message]
    assert [record.levelname for record in ours if "cannot be opened" in record.message] == ["WARNING"]

    folder.unlink()
    folder.mkdir()
    (tmp_path / "runs" / "mlflow.db").rename(folder / "mlflow.db")
    assert tracking.drain(20)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    assert len(rows(client, run, "train/loss")) == 3
    tracking.close()


def test_unsent_records_go_out_with_the_next_process(
    start: Start, client: MlflowClient, tmp_path: Path
) -> None:
    nowhere = Tracking("http://127.0.0.1:9", "food", tmp_path / "spool")
    run = nowhere.run("food")
    run.metrics({"loss": 1.0}, 0)
    run.finish("KILLED")
    assert not nowhere.close(timeout=0.2)
    assert start().drain(20)
    assert rows(client, run, "train/loss") == [(0, 1.0)]
    assert client.get_run(mlflow_id(run)).info.status == "KILLED"


def test_what_mlflow_refuses_does_not_hold_up_the_rest(
    start: Start, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = start()
    run = tracking.run("food")
    run.metrics({"loss": 0.0}, 0)
    tracking._spool.append(run.run_id, 2**70, {"loss": 1.0})  # no database takes such a step
    run.metrics({f"value{i}": float(i) for i in range(1500)}, 2)
    run.metrics({"loss": 2.0}, 2, channel="eval")
    assert tracking.drain(20), caplog.text
    assert rows(client, run, "train/loss") == [(0, 0.0)]
    assert rows(client, run, "train/value1499") == [(2, 1499.0)]
    assert rows(client, run, "eval/loss") == [(2, 2.0)]


def test_a_run_lost_from_the_database_is_logged_anew(
    start: Start, client: MlflowClient, uri: str, empty_database: Path
) -> None:
    with start() as tracking:
        run = tracking.run("food")
        run.metrics({"loss": 0.0}, 0)
    path = Path(uri.removeprefix("sqlite:///"))
    path.write_bytes(empty_database.read_bytes())
    tracking = start()
    run.metrics({"loss": 1.0}, 1)
    assert tracking.drain(20)
    assert rows(client, run, "train/loss") == [(0, 0.0), (1, 1.0)]


def test_new_database_keeps_its_artifacts_beside_it(tmp_path: Path) -> None:
    code = """
import threading
from pathlib import Path
from orchestrator.tracking.run import Tracking
from orchestrator.tracking.mlflow_writer import MlflowWriter
recorded, prepare = threading.Event(), MlflowWriter.prepare
def late(sink):
    assert recorded.wait(60), "the caller waits for the import or for the schema"
    prepare(sink)
MlflowWriter.prepare = late
tracking = Tracking("sqlite:///deep/er/mlflow.db", "food", Path("deep/spool"))
run = tracking.run("food")
recorded.set()
Path("note.txt").write_text("note")
run.file(Path("note.txt"))
assert tracking.close(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "MLflow and alembic keep quiet"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "note.txt"]
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["mlartifacts", "mlflow.db"]
    assert len(list((tmp_path / "deep" / "er" / "mlartifacts").rglob("note.txt"))) == 1


def test_a_half_built_database_never_gets_its_name(tmp_path: Path) -> None:
    code = """
import os, signal
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from orchestrator.tracking.connect import connect
SqlAlchemyStore._create_default_experiment = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
connect("sqlite:///mlflow.db")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()


def test_runs_import_neither_mlflow_nor_torch() -> None:
    code = (
        "import sys, orchestrator.tracking.run, orchestrator.tracking.registry\n"
        "import orchestrator.storage.artifacts\n"
        "print([name for name in ('mlflow', 'torch', 'ray', 'sqlalchemy') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_unknown_address_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot track"):
        Tracking("./mlruns", "food", tmp_path)


def test_null_run_keeps_history_and_dedupes() -> None:
    run = NullRun().child("stage")
    assert run.metrics({"loss": 1}, 0)
    assert not run.metrics({"loss": 2}, 0)
    assert run.metrics({"knn": 3}, 0, channel="eval")
    assert [record["metrics"] for record in run.history()] == [{"loss": 1.0}]
    assert run.mlflow_run_id(5) is None


def test_what_a_crash_left_open_below_a_run_ends_with_it(tmp_path: Path) -> None:
    """A killed driver's student runs are known to the spool only; closing their stage closes them."""
    spool = Spool(tmp_path)
    stage = open_run(spool, "sqlite:///unused.db", "distill", None, None)
    left = stage.child("distill/left")
    done = stage.child("distill/done")
    done.finish("FINISHED")
    open_run(spool, "sqlite:///unused.db", "another", None, None)
    assert spool.open_children(stage.run_id) == [left.run_id]
    open_run(Spool(tmp_path), "sqlite:///unused.db", "distill", stage.run_id, None).finish("KILLED")
    last = {run: [record for record, _ in spool.read(run)][-1] for run in (left.run_id, done.run_id)}
    assert last[left.run_id]["op"] == "finish"
    assert last[left.run_id]["status"] == "KILLED"
    assert last[done.run_id]["status"] == "FINISHED"
    assert spool.open_children(stage.run_id) == []
