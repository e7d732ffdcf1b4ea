"""A folder or a registered model: which one is meant is never a guess, and what comes is what was published."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import orchestrator
from orchestrator.errors import UserError
from orchestrator.inference.reference import locate, weights_digest
from orchestrator.models import build, save_pretrained
from orchestrator.tracking import download, registry
from orchestrator.tracking.run import Tracking


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> str:
    """A registry with two versions of `food-vit`: 1 is the champion, 2 has the alias `next`."""
    folder = tmp_path_factory.mktemp("registry")
    shutil.copyfile(empty_database, folder / "mlflow.db")
    found = f"sqlite:///{folder / 'mlflow.db'}"
    with Tracking(found, "food", folder / "spool") as tracking:
        run = tracking.run("food")
        for number, alias in ((1, "champion"), (2, "next")):
            registry.publish(run, "food-vit", weights(folder / str(number), number), {}, alias)
    return found


def weights(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return folder


def cls_token(model: orchestrator.Model) -> torch.Tensor:
    found: torch.Tensor = model.module.state_dict()["cls_token"]  # type: ignore[union-attr]
    return found


def published(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    found: torch.Tensor = build("vit_femto").state_dict()["cls_token"]
    return found


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("spelled", "number"),
    [
        ("food-vit@champion", 1),
        ("food-vit", 1),
        ("food-vit:1", 1),
        ("food-vit:02", 2),
        ("models:/food-vit/2", 2),
    ],
)
def test_a_registered_model_is_loaded_by_alias_and_version(
    uri: str, cache: Path, spelled: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.equal(cls_token(orchestrator.load(spelled, tracking=uri)), published(number))
    located = locate(spelled, uri)
    assert located.name == f"food-vit:{number}"
    assert located.path.parent == cache / "models"
    assert [path.name for path in (cache / "models").iterdir()] == [located.path.name], "nothing else is left"
    # The environment says where, too, and what is in the cache is not fetched again.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(download, "pull", None)
    assert torch.equal(cls_token(orchestrator.load(spelled)), published(number))
    vector = orchestrator.embed(spelled, np.zeros((20, 20, 3), np.uint8))
    assert vector.shape == (48,)


@pytest.mark.heavy
def test_what_is_damaged_in_the_cache_is_fetched_again(uri: str) -> None:
    folder = locate("food-vit", uri).path
    for damage in (lambda file: file.write_bytes(b"x"), Path.unlink):
        damage(folder / "model.safetensors")
        assert torch.equal(cls_token(orchestrator.load("food-vit", tracking=uri)), published(1))
    (folder / "more.json").write_text("{}")
    locate("food-vit", uri)
    assert not (folder / "more.json").exists()


@pytest.mark.heavy
def test_two_that_fetch_the_same_at_once_both_have_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pull = download.pull

    def overtaken(*arguments: object) -> Path:
        pull(*arguments)  # type: ignore[arg-type]
        return pull(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(download, "pull", overtaken)
    assert torch.equal(cls_token(orchestrator.load("food-vit", tracking=uri)), published(1))


@pytest.mark.heavy
def test_what_is_not_registered_is_one_error(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for spelled, expected, hint in (
        ("food-vt", "no folder 'food-vt' here, and in the registry: no model 'food-vt'", "food-vit"),
        ("food-vit@best", "food-vit has no alias 'best'", "food-vit@champion"),
        ("food-vit:9", "food-vit has no version '9'", "food-vit@champion"),
        ("food-vit/1", "food-vit/1 does not exist", "write food-vit:1 for version 1"),
        ("a/b", "does not exist", "NAME@ALIAS"),
        ("food-vit:one", "food-vit has no version 'one'", "food-vit@champion"),
        ("food-vit@", "'food-vit@' does not name a version", "food-vit@champion"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            orchestrator.load(spelled, tracking=uri)
        assert hint in (caught.value.hint or ""), spelled
    assert list(tmp_path.iterdir()) == []


def test_without_a_registry_one_error_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=r"no folder 'vit' here, and in the registry: .*no MLflow database at .*runs/mlflow\.db",
    ):
        orchestrator.load("vit")
    with pytest.raises(UserError, match="no MLflow database") as caught:
        orchestrator.load("vit@champion", tracking="sqlite:///other.db")
    assert "other.db" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(download, "version_of", lambda *given: download.Version("vit", "1", "a" * 64))
    with pytest.raises(UserError, match="the cache cannot be written") as caught:
        orchestrator.load("vit@champion")
    assert "ORCHESTRATOR_CACHE" in (caught.value.hint or "")
    for content in ("", "../../etc"):
        monkeypatch.setattr(download, "version_of", lambda *given: download.Version("vit", "1", content))  # noqa: B023
        with pytest.raises(UserError, match="without the sha256"):
            orchestrator.load("vit@champion")


def test_a_folder_goes_first_where_a_bare_name_could_be_both(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is never taken for a registered model that is spelled out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "version_of", None)
    for given in ("model", "./model", str(model), model, Path("model"), "model/"):
        assert locate(given).name == str(model)
    model.rename("model@champion")
    with pytest.raises(
        UserError, match=r"a registered model by its spelling, and there is a folder"
    ) as caught:
        locate("model@champion")
    assert "./model@champion" in (caught.value.hint or "")
    assert locate("./model@champion").path == Path("model@champion")
    assert locate(Path("model@champion")).path == Path("model@champion")
    assert "models:/model@champion" in (caught.value.hint or "")


def test_an_artifact_and_what_was_published_of_it_have_the_same_weights(model: Path, tmp_path: Path) -> None:
    published_ = tmp_path / "published"
    shutil.copytree(model, published_)
    (published_ / "README.md").write_text("a card")
    (published_ / "MLmodel").write_text("flavors: {}")
    (tmp_path / "artifact").mkdir()
    shutil.copytree(model, tmp_path / "artifact" / "model")
    assert weights_digest(model) == weights_digest(published_) == weights_digest(tmp_path / "artifact")
    assert weights_digest(weights(tmp_path / "other", 5)) != weights_digest(model)
