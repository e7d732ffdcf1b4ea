"""What MLflow has of a pipeline after a run, asked of a real database."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import mlflow
import numpy as np
import pandas as pd
import pytest
import toys
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.pyfunc import load_model
from PIL import Image
from rich.console import Console

from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.pipeline.plan.stage_plan import resolve
from orchestrator.pipeline.run.driver import execute
from orchestrator.pipeline.tracking import mlflow_record, system_metrics
from orchestrator.stages.base import Context
from orchestrator.tracking.run import NullRun, open_run
from orchestrator.tracking.spool import Record, Spool


class Trained(toys.Pretrain):
    """A toy that leaves a real backbone, an empty student's run, and a piece."""

    outputs: ClassVar[Mapping[str, str]] = {"result.json": "…", "model": "a backbone"}

    def models(self) -> Mapping[str, str]:
        return {"": "model"}

    def run(self, context: Context) -> Mapping[str, float]:
        from orchestrator.models import build, save_pretrained

        figures = super().run(context)
        save_pretrained(
            context.out / "model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16}
        )
        child = context.run.child(f"{context.name}/nano", resume_id=f"{context.run.run_id}-nano")
        for step in range(3):
            child.metrics({"loss": 9.0 - step}, step)
        child.finish("FINISHED")
        with context.part("piece", {"name": "nano"}) as part:
            if part.artifact is None:
                draft = context.out.with_name("draft")
                draft.mkdir()
                (draft / "value").write_text("1")
                part.publish(draft, {})
        return figures


def database() -> str:
    # MLflow keeps a connection by its address, and a relative one is that of another test.
    return f"sqlite:///{Path('runs/mlflow.db').absolute()}"


def loaded_with_model(path: Path) -> LoadedPipeline:
    loaded = load(path, stage_type=toys.ToyStage)
    trained = Trained.model_validate(loaded.spec.stages["pretrain"].model_dump())
    spec = loaded.spec.model_copy(update={"stages": {**loaded.spec.stages, "pretrain": trained}})
    return LoadedPipeline(spec, loaded.document)


def run(path: Path) -> int:
    loaded = loaded_with_model(path)
    stages = resolve(loaded, lambda source, name: hashlib.sha256(name.encode()).hexdigest())
    return execute(loaded, stages, Reporter(Console(file=io.StringIO())))


def runs(client: MlflowClient) -> dict[str, MlflowRun]:
    experiment = client.get_experiment_by_name("toy")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({one.info.run_name for one in found}) == len(found)
    return {str(one.info.run_name): one for one in found}


def files(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    return [one.path for one in client.list_artifacts(run_id, folder)]


def points(client: MlflowClient, one: MlflowRun, name: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(one.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def test_everything_is_in_mlflow_or_referenced(pipeline: Path, empty_database: Path) -> None:
    Path("runs").mkdir()
    shutil.copyfile(empty_database, "runs/mlflow.db")
    pipeline.write_text(pipeline.read_text().replace("optim: {lr: 0.2}", "ticks: 60"))
    assert run(pipeline) == 0
    client = MlflowClient(database())
    found = runs(client)
    root, curate, pretrain = found["toy"], found["curate"], found["pretrain"]

    check_datasets(root, curate, pretrain)
    check_model(client, pretrain)
    # The store may be moved before this is sent.
    spool = Spool(Path("runs/spool/toy"))
    folders = [one["folder"] for run in spool.run_ids() for one, _ in spool.read(run) if one["op"] == "model"]
    assert folders == [f"pretrain-{pretrain.data.tags['orchestrator.key'][:16]}/model"]
    check_artifacts(client, root, pretrain)
    check_description(client, root, pretrain)

    # Charts: the losses of the stage and of its student on the pipeline's run, and every stage's figures.
    assert points(client, root, "pretrain/loss") == points(client, pretrain, "train/loss")
    assert len(points(client, root, "pretrain/loss")) == 60
    assert points(client, root, "pretrain/nano/loss") == [(0, 9.0), (1, 8.0), (2, 7.0)]
    assert points(client, root, "summary/pretrain/ticks") == [(0, 60.0)]
    assert points(client, root, "summary/evaluate/ticks") == [(0, 1.0)]


def check_datasets(root: MlflowRun, curate: MlflowRun, pretrain: MlflowRun) -> None:
    def names(one: MlflowRun) -> dict[str, str]:
        return {given.dataset.name: given.dataset.digest for given in one.inputs.dataset_inputs}

    photos = hashlib.sha256(b"photos").hexdigest()
    assert names(curate) == {"photos": photos[:36]}
    key = pretrain.data.tags["orchestrator.input.index"]
    assert names(pretrain) == {"curate index": key[:36]}
    assert names(root) == names(curate) | names(pretrain)
    (given,) = pretrain.inputs.dataset_inputs
    assert json.loads(given.dataset.source)["uri"].endswith(f"artifacts/curate-{key[:16]}")
    assert json.loads(given.dataset.profile)["ticks"] == 1
    assert {tag.key: tag.value for tag in given.tags} == {"mlflow.data.context": "training", "digest": key}


@pytest.fixture(autouse=True)
def own_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `mlflow.set_tracking_uri` leaves in the environment ends with the test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


def check_model(client: MlflowClient, pretrain: MlflowRun) -> None:
    (output,) = pretrain.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("pretrain", "READY", pretrain.info.run_id)
    assert model.model_type == "vit_femto"
    assert (model.params["ticks"], model.params["model.dim"]) == ("60", "48")
    assert {metric.key: metric.value for metric in model.metrics}["model/ticks"] == 60
    photo = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(photo, "JPEG")
    mlflow.set_tracking_uri(database())
    loaded = load_model(f"models:/{model.model_id}")
    assert loaded.predict(pd.DataFrame({"image": [photo.getvalue()]})).shape == (1, 48)
    assert loaded.metadata.signature.inputs.to_dict()[0]["type"] == "binary"


def check_artifacts(client: MlflowClient, root: MlflowRun, pretrain: MlflowRun) -> None:
    folder = Path(client.download_artifacts(root.info.run_id, "artifacts.json"))
    listed = json.loads(folder.read_text())
    assert sorted(listed) == ["curate", "evaluate", "pretrain"]
    assert [one["kind"] for one in listed["pretrain"]] == ["pretrain", "piece"]
    there = {path.name for path in Path("runs/artifacts").iterdir()}
    for one in (one for ones in listed.values() for one in ones):
        place = Path(one["uri"].removeprefix("file://"))
        there.remove(place.name)
        manifest = (place / "manifest.json").read_bytes()
        assert one["sha256_of_manifest"] == hashlib.sha256(manifest).hexdigest()
        assert one["bytes"] == sum(entry["size"] for entry in json.loads(manifest)["files"].values())
    assert not there, "every artifact of the store is listed"
    own = listed["pretrain"][0]
    assert pretrain.data.tags["orchestrator.artifact.uri"] == own["uri"]
    assert pretrain.data.tags["orchestrator.artifact.sha256_of_manifest"] == own["sha256_of_manifest"]


def check_description(client: MlflowClient, root: MlflowRun, pretrain: MlflowRun) -> None:
    note = root.data.tags["mlflow.note.content"]
    assert "| curate | curate | data photos | done |" in note
    assert "| evaluate | evaluate | pretrain, curate | done |" in note
    own = pretrain.data.tags["mlflow.note.content"]
    assert "Stage **pretrain** of kind `pretrain`" in own
    assert "- runs because: never ran" in own
    assert f"| index | curate | `{pretrain.data.tags['orchestrator.input.index'][:8]}` |" in own
    here = Path(mlflow_record.__file__).parent
    commit = subprocess.run(
        ["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        assert root.data.tags["mlflow.source.git.commit"] == commit.stdout.strip()
    assert root.data.tags["version.torch"].startswith("2.")
    assert "environment/packages.txt" in files(client, root.info.run_id, "environment")


def test_system_metrics_count_on_when_a_stage_goes_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    root = open_run(spool, "sqlite:///unused.db", "toy", None, None)
    stage = root.child("pretrain")
    counts = []
    for _ in range(2):
        with system_metrics.watched(root, stage, "pretrain", every_s=0.05):
            time.sleep(0.6)
        counts.append(len(stage.history("system")))
    history = stage.history("system")
    assert counts[0] >= 1
    assert counts[1] >= counts[0] + 2, "no sample of the second attempt was taken for one of the first"
    assert [one["step"] for one in history] == list(range(len(history)))
    newest = history[-1]["metrics"]
    assert 0 <= newest["cpu_utilization_percentage"] <= 100
    assert newest["system_memory_usage_megabytes"] > 50


def test_trouble_with_system_metrics_does_not_reach_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("no driver")

    monkeypatch.setattr(system_metrics, "machine_metrics", broken)
    spool = Spool(tmp_path / "spool")
    root = open_run(spool, "sqlite:///unused.db", "toy", None, None)
    stage = root.child("pretrain")
    with system_metrics.watched(root, stage, "pretrain", every_s=0.01):
        time.sleep(0.2)
        stage.metrics({"loss": 1.0}, 0)
    assert [record.message for record in caplog.records] == [
        "system metrics of stage pretrain end here: no driver"
    ]
    assert [one["metrics"] for one in root.history("pretrain")] == [{"loss": 1.0}]
    with system_metrics.watched(NullRun(), NullRun(), "untracked", every_s=0.01):
        time.sleep(0.05)


class Troubled(NullRun):
    """Fails at what it is told to."""

    trouble: ClassVar[set[str]] = set()

    def history(self, channel: str = "train") -> list[Record]:
        return self._or_fail("history", super().history(channel))

    def since(self, position: int) -> tuple[list[Record], int]:
        return self._or_fail("since", super().since(position))

    def _or_fail(self, what: str, value: Any) -> Any:
        if what in self.trouble:
            raise RuntimeError(f"no {what}")
        return value


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("history", "system metrics of stage pretrain count from 0: no history"),
        ("since", "the pipeline's run is missing losses of stage pretrain: no since"),
    ],
)
def test_trouble_before_and_after_a_stage_does_not_cost_its_outcome(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, said: str
) -> None:
    monkeypatch.setattr(Troubled, "trouble", {what})
    outcome = None
    with system_metrics.watched(NullRun(), Troubled(), "pretrain", every_s=60):
        outcome = "done"
    assert outcome == "done"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_losses_are_not_copied_by_two_threads_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One is still asking nvidia-smi when the stage is over, and then copies the newest losses."""
    asked, over = threading.Event(), threading.Event()

    def slow() -> dict[str, float]:
        asked.set()
        over.wait(30)
        return {"x": 1.0}

    copied_by: list[threading.Thread] = []
    monkeypatch.setattr(system_metrics, "machine_metrics", slow)
    for name in ("newest", "rest"):
        monkeypatch.setattr(
            system_metrics.Follower, name, lambda follower: copied_by.append(threading.current_thread())
        )
    with system_metrics.watched(NullRun(), NullRun(), "pretrain", every_s=0.01):
        asked.wait(30)
    over.set()
    assert threading.current_thread() not in copied_by
    assert "the pipeline's run is missing losses of stage pretrain" in caplog.text


def test_gpus_are_read_from_nvidia_smi() -> None:
    text = "0, 87, 40960, 81920, 512.5\n1, 3, [N/A], 81920, [N/A]\nbroken\n"
    found: dict[str, Any] = system_metrics.parse_gpus(text)
    assert found == {
        "gpu_0_utilization_percentage": 87.0,
        "gpu_0_memory_usage_megabytes": 40960 * 2**20 / 1e6,
        "gpu_0_memory_usage_percentage": 50.0,
        "gpu_0_power_usage_watts": 512.5,
        "gpu_1_utilization_percentage": 3.0,
    }


def test_long_curves_are_thinned_evenly(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    root = open_run(spool, "sqlite:///unused.db", "toy", None, None)
    stage = root.child("pretrain")
    for step in range(4500):
        stage.metrics({"loss": float(step)}, step)
    follower = system_metrics.Follower(root, stage, "pretrain")
    follower.newest()
    assert [one["step"] for one in root.history("pretrain")] == [4499]
    follower.rest()
    steps = sorted(one["step"] for one in root.history("pretrain"))
    assert (steps[0], steps[-1]) == (0, 4499)
    assert 500 < len(steps) <= 1001
    gaps = {later - earlier for earlier, later in itertools.pairwise(steps[:-1])}
    assert len(gaps) == 1
    again = len(root.history("pretrain"))
    system_metrics.Follower(root, stage, "pretrain").rest()
    assert len(root.history("pretrain")) == again, "a second driver doubles nothing"


def test_large_models_are_referenced_only(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> None:
    Path("runs").mkdir()
    shutil.copyfile(empty_database, "runs/mlflow.db")
    monkeypatch.setattr(mlflow_record, "MOST_BYTES", 1000)
    assert run(pipeline) == 0
    client = MlflowClient(database())
    (output,) = runs(client)["pretrain"].outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert list(Path(model.artifact_location.removeprefix("file://")).rglob("*")) == []
    digests = json.loads(model.tags["orchestrator.files"])
    place = Path(model.tags["orchestrator.uri"].removeprefix("file://"))
    weights = (place / "model.safetensors").read_bytes()
    assert digests["model/model.safetensors"] == hashlib.sha256(weights).hexdigest()
