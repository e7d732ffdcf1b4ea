"""Where the files of an experiment go, and how MLflow is told of a server other than AWS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orchestrator.tracking.connect import connect, ensure_experiment
from orchestrator.tracking.download import pull
from orchestrator.tracking.registry import publish
from orchestrator.tracking.run import Tracking


@pytest.mark.heavy
def test_only_a_new_experiment_takes_the_place(uri: str) -> None:
    client = connect(uri)
    beside = ensure_experiment(client, uri, "old")
    again = ensure_experiment(client, uri, "old", "s3://bucket/p/mlartifacts")
    new = ensure_experiment(client, uri, "new", "s3://bucket/p/mlartifacts")
    assert again == beside
    assert client.get_experiment(beside).artifact_location.startswith("file://")
    assert client.get_experiment(new).artifact_location == "s3://bucket/p/mlartifacts"
    assert client.get_experiment(new).tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"AWS_ENDPOINT_URL": "http://a"}, "http://a"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b"}, "http://b"),
        ({"AWS_ENDPOINT_URL": "http://a", "MLFLOW_S3_ENDPOINT_URL": "http://c"}, "http://c"),
        ({}, "none"),
    ],
)
def test_mlflow_gets_the_endpoint(
    uri: str, given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    connect(uri)
    assert os.environ.get("MLFLOW_S3_ENDPOINT_URL", "none") == expected


def test_files_and_models_go_through_the_bucket(uri: str, s3_uri: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    with Tracking(uri, "food", tmp_path / "spool", f"{s3_uri}/mlartifacts") as tracking:
        run = tracking.run("food")
        run.file(model / "config.json", "pictures")
        assert tracking.drain(60)
        publish(run, "vit", model, {}, "champion")
        run.finish("FINISHED")
    out = pull("vit@champion", tmp_path / "out", uri)
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()

    from orchestrator.storage.s3 import S3Store

    names = list(S3Store(s3_uri).list("mlartifacts/"))
    assert any(name.endswith("/pictures/config.json") for name in names)
    assert any(name.endswith("/model.safetensors") for name in names)
    assert not list((tmp_path / "runs").glob("mlartifacts/*"))
