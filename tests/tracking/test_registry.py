from __future__ import annotations

import json
import pickletools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file, save_file

from orchestrator.errors import UserError
from orchestrator.tracking import registry
from orchestrator.tracking.runs import NullRun, SpooledRun, Tracking

LINEAGE = {"dataset": "food", "key.pretrain": "ab12"}


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def run(
    start: Callable[[], Tracking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SpooledRun]:
    # MLflow's habit of opening a database in the working folder must show as litter.
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield start().run("food")
    assert list((tmp_path / "cwd").iterdir()) == []


def model(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir()
    save_file({"weight": np.full((2, 3), value, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"preset": "vit_femto"}))
    return folder


def is_pickle(path: Path) -> bool:
    try:
        list(pickletools.genops(path.read_bytes()))
    except Exception:
        return path.suffix in (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib")
    return True


def test_published_model_comes_back_byte_for_byte(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    source = model(tmp_path / "model")
    assert registry.publish(run, "food-vit", source, LINEAGE, "best") == 1
    out = registry.pull("food-vit@best", tmp_path / "out", uri)

    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (load_file(out / "model.safetensors")["weight"] == 1.0).all()
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    version = client.get_model_version_by_alias("food-vit", "best")
    assert version.run_id == run.mlflow_run_id()
    assert LINEAGE.items() <= version.tags.items()
    assert client.get_registered_model("food-vit").tags == LINEAGE
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_no_artifact_is_a_pickle(run: SpooledRun, uri: str, tmp_path: Path) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), LINEAGE, "best")
    files = [path for path in (tmp_path / "runs" / "mlartifacts").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not any(is_pickle(path) for path in files)


def test_publishing_again_makes_no_second_version_of_the_same(
    run: SpooledRun, uri: str, tmp_path: Path
) -> None:
    first, second = model(tmp_path / "a"), model(tmp_path / "b", 2.0)
    assert registry.publish(run, "food-vit", first, LINEAGE, "best") == 1
    assert registry.publish(run, "food-vit", first, LINEAGE, "best") == 1
    assert registry.publish(run, "food-vit", second, LINEAGE, "best") == 2
    assert registry.publish(run, "food-vit", first, {**LINEAGE, "dataset": "stamps"}, "other") == 3
    assert (
        load_file(registry.pull("food-vit@best", tmp_path / "x", uri) / "model.safetensors")["weight"] == 2
    ).all()
    assert (
        load_file(registry.pull("food-vit/1", tmp_path / "y", uri) / "model.safetensors")["weight"] == 1
    ).all()


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("food-vt@best", "food-vit"),
        ("food-vit@bst", "food-vit@best"),
        ("food-vit/7", "food-vit@best"),
        ("food-vit/x", "food-vit@best"),
        ("food-vit", "food-vit@best"),
        ("food-vit@", "food-vit@best"),
    ],
)
def test_wrong_references_name_the_right_one(
    run: SpooledRun, uri: str, tmp_path: Path, reference: str, hint: str
) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    with pytest.raises(UserError) as caught:
        registry.pull(reference, tmp_path / "out", uri)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_pull_overwrites_nothing_and_trusts_nothing(run: SpooledRun, uri: str, tmp_path: Path) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    with pytest.raises(UserError, match="not empty"):
        registry.pull("food-vit@best", tmp_path / "model", uri)
    with pytest.raises(UserError, match="no MLflow database"):
        registry.pull("food-vit@best", tmp_path / "out", f"sqlite:///{tmp_path}/none.db")
    stored = next((tmp_path / "runs" / "mlartifacts").rglob("model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="not those that were published"):
        registry.pull("food-vit@best", tmp_path / "out", uri)
    stored.unlink()
    with pytest.raises(UserError):
        registry.pull("food-vit@best", tmp_path / "out", uri)
    assert not (tmp_path / "out").exists()


def test_only_models_without_pickles_are_published(run: SpooledRun, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not .*optimizer\.pt"):
        registry.publish(run, "food-vit", folder, {}, "best")
    (folder / "optimizer.pt").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="holds no model"):
        registry.publish(run, "food-vit", folder, {}, "best")


def test_publishing_needs_tracking(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracking is off"):
        registry.publish(NullRun(), "food-vit", model(tmp_path / "model"), {}, "best")
    unreachable = Tracking("http://127.0.0.1:9", "food", tmp_path / "spool")
    with pytest.raises(UserError, match="did not answer"):
        registry.publish(unreachable.run("x"), "food-vit", tmp_path / "model", {}, "best", timeout=0.1)
