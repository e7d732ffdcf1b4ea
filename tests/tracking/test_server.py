"""Runs, models and the registry on a real MLflow server whose artifacts are on S3, as several people would use one."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow_server
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from orchestrator.fsio import DIGESTS
from orchestrator.models import build, embed, load_pretrained, save_pretrained
from orchestrator.stages.common.mlmodel import mlmodel
from orchestrator.storage.s3 import S3Store
from orchestrator.tracking import download, model_files, registry
from orchestrator.tracking.run import Dataset, ModelRecord, Run, Tracking

SIZE = 16
TAGS = {"orchestrator.pipeline": "food"}


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, s3_uri: str, empty_database: Path
) -> Iterator[str]:
    if request.param == "sqlite":
        shutil.copyfile(empty_database, tmp_path / "server.db")
        with mlflow_server.mlflow_server(
            tmp_path, f"sqlite:///{tmp_path}/server.db", f"{s3_uri}/files"
        ) as uri:
            yield uri
        return
    if (why := mlflow_server.why_no_postgres()) is not None:
        pytest.skip(why)
    with (
        mlflow_server.postgres(tmp_path) as backend,
        mlflow_server.mlflow_server(tmp_path, backend, f"{s3_uri}/files") as uri,
    ):
        yield uri


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": SIZE})
    return folder


def told(uri: str, spool: Path, backbone: Path, resume: tuple[str, str] | None = None) -> tuple[Run, Run]:
    """A pipeline's run and a stage's that have everything; all of it is sent when this returns."""
    with Tracking(uri, "food", spool, artifacts=backbone.parent) as tracking:
        root = tracking.run("food", resume_id=resume[0] if resume else None)
        stage = root.child("pretrain", resume_id=resume[1] if resume else None)
        for step in range(20):
            stage.metrics({"loss": 1.0 / (step + 1)}, step)
            stage.metrics({"cpu_utilization_percentage": 50.0}, step, "system")
        data = Dataset("photos", "ab" * 32, "file:///photos", {"images": 542}, "curation")
        stage.datasets([data])
        texts = {"MLmodel": mlmodel(backbone)}
        figures = {"last_loss": 0.05}
        stage.model(
            ModelRecord(
                "pretrain", "vit_femto", backbone, texts, {"lr": {"peak": 1}}, {"key": "k"}, figures, 20
            )
        )
        stage.text("artifacts.json", "{}")
        stage.finish("FINISHED")
        assert tracking.drain(120)
    return root, stage


def test_everything_reaches_a_server_once(
    server: str, s3_uri: str, tmp_path: Path, backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "spool"
    root, stage = told(server, spool, backbone)
    # As if the notes of what was sent were lost, and a driver went on: nothing is there twice.
    for note in spool.glob("*.progress"):
        note.unlink()
    told(server, spool, backbone, (root.run_id, stage.run_id))

    assert capfd.readouterr().out == "", "MLflow keeps quiet"

    client = MlflowClient(server, server)
    experiment = client.get_experiment_by_name("food")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
    run = client.get_run(stage.mlflow_run_id() or "")
    assert [one.step for one in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(20))
    assert len(client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")) == 20
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("photos", ("ab" * 32)[:36])
    (model,) = client.search_logged_models([experiment.experiment_id])
    (output,) = run.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 20)
    assert (model.name, str(model.status), model.params) == ("pretrain", "READY", {"lr.peak": "1"})
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.step) == ("model/last_loss", 0.05, 20)
    (logged,) = client.get_metric_history(run.info.run_id, "model/last_loss")
    assert logged.step == 20
    names = [Path(name).name for name in S3Store(s3_uri).list("files/")]
    assert sorted(names) == ["MLmodel", "artifacts.json", "config.json", "model.safetensors"]


def test_what_is_published_is_loaded_from_the_server(
    server: str, s3_uri: str, tmp_path: Path, backbone: Path
) -> None:
    (backbone / "MLmodel").write_text(mlmodel(backbone))
    content = model_files.content_digest({path.name: DIGESTS.of(path) for path in sorted(backbone.iterdir())})
    with Tracking(server, "food", tmp_path / "spool") as tracking:
        run = tracking.run("publish")
        assert registry.difference(server, "food-vit", content, TAGS, "champion") is not None
        assert registry.publish(run, "food-vit", backbone, TAGS, "champion") == 1
        assert registry.difference(server, "food-vit", content, TAGS, "champion") is None
        assert registry.publish(run, "food-vit", backbone, TAGS, "champion") == 1
        run.finish("FINISHED")
    pulled = download.pull("food-vit@champion", tmp_path / "pulled", server)
    assert (pulled / "model.safetensors").read_bytes() == (backbone / "model.safetensors").read_bytes()

    photo = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)).save(
        photo, "JPEG"
    )
    code = (
        "import base64, json, sys; import mlflow, pandas as pd\n"
        "model = mlflow.pyfunc.load_model('models:/food-vit@champion')\n"
        "photo = base64.b64decode(sys.argv[1])\n"
        "print(json.dumps(model.predict(pd.DataFrame({'image': [photo]})).tolist()))"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": server, "PYTHONPATH": str(Path(__file__).parents[2])}
    # The server alone knows the bucket.
    environment = {name: value for name, value in environment.items() if not name.startswith("AWS_")}
    done = subprocess.run(
        [sys.executable, "-c", code, base64.b64encode(photo.getvalue()).decode()],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = embed(load_pretrained(backbone), Image.open(photo), SIZE).numpy()
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1])[0], expected, atol=1e-6)


def test_a_server_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.errors import UserError

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="does not answer"):
        registry.difference("http://127.0.0.1:9", "food-vit", "", TAGS, "champion")
