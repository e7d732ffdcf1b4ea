from __future__ import annotations

import hashlib
import json
import os
import pickletools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from safetensors.numpy import load_file, save_file

from orchestrator.errors import UserError
from orchestrator.tracking import download, model_files, registry, relocate
from orchestrator.tracking.run import NullRun, SpooledRun, Tracking

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
    out = download.pull("food-vit@best", tmp_path / "out", uri)

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
        load_file(download.pull("food-vit@best", tmp_path / "x", uri) / "model.safetensors")["weight"] == 2
    ).all()
    assert (
        load_file(download.pull("food-vit/1", tmp_path / "y", uri) / "model.safetensors")["weight"] == 1
    ).all()


def test_what_is_pulled_others_may_read(run: SpooledRun, uri: str, tmp_path: Path) -> None:
    made = model(tmp_path / "model")
    (made / "model.safetensors").chmod(0o600)
    registry.publish(run, "food-vit", made, LINEAGE, "best")
    out = download.pull("food-vit@best", tmp_path / "out", uri)
    assert {path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()} == {0o644}


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("food-vt@best", "food-vit"),
        ("food-vit@bst", "food-vit@best"),
        ("food-vit/7", "food-vit@best"),
        ("food-vit/x", "food-vit@best"),
        ("food-vit@", "food-vit@best"),
        ("food-vit:", "food-vit@best"),
        ("food-vit:7", "food-vit@best"),
        ("food-vit:latest", "food-vit@best"),
    ],
)
def test_wrong_references_name_the_right_one(
    run: SpooledRun, uri: str, tmp_path: Path, reference: str, hint: str
) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    with pytest.raises(UserError) as caught:
        download.pull(reference, tmp_path / "out", uri)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_version_that_a_reference_means(run: SpooledRun, uri: str, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        folder = model(tmp_path / str(number), number)
        assert (
            registry.publish(run, "food-vit", folder, LINEAGE, "best" if number < 3 else "challenger")
            == number
        )

    def pulled(reference: str) -> str:
        found = download.fetch(reference, tmp_path / f"out {reference.replace('/', ' ')}", uri)
        assert (load_file(found.folder / "model.safetensors")["weight"] == found.version).all()
        return str(found)

    assert pulled("food-vit@best") == "food-vit version 2 (@best)"
    assert pulled("food-vit:1") == pulled("food-vit/1") == "food-vit version 1"
    assert pulled("food-vit") == "food-vit version 3", "the newest: there is no champion"
    registry.publish(run, "food-vit", tmp_path / "1", LINEAGE, "champion")
    shutil.rmtree(tmp_path / "out food-vit")
    assert pulled("food-vit") == "food-vit version 1 (@champion)"


def test_pull_overwrites_nothing_and_trusts_nothing(run: SpooledRun, uri: str, tmp_path: Path) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    with pytest.raises(UserError, match="not empty"):
        download.pull("food-vit@best", tmp_path / "model", uri)
    with pytest.raises(UserError, match="no MLflow database"):
        download.pull("food-vit@best", tmp_path / "out", f"sqlite:///{tmp_path}/none.db")
    stored = next((tmp_path / "runs" / "mlartifacts").rglob("model.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="not those that were published"):
        download.pull("food-vit@best", tmp_path / "out", uri)
    stored.unlink()
    with pytest.raises(UserError):
        download.pull("food-vit@best", tmp_path / "out", uri)
    assert not (tmp_path / "out").exists()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_not_what_was_trained_is_not_published(
    run: SpooledRun, client: MlflowClient, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    digests = {path.name: sha256(path) for path in folder.iterdir()}
    (folder / "README.md").write_text("a card is written later")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that was trained"):
        registry.publish(run, "food-vit", folder, {}, "best", digests=digests)
    assert list(client.search_registered_models()) == []


def test_a_file_that_changes_while_it_is_published_is_not_pulled(
    run: SpooledRun, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(tmp_path / "model")
    digests = {path.name: sha256(path) for path in folder.iterdir()}
    create = registry._create

    def late(*args: Any) -> int:
        (folder / "config.json").write_text("{}")
        return create(*args)

    monkeypatch.setattr(registry, "_create", late)
    registry.publish(run, "food-vit", folder, {}, "best", digests=digests)
    with pytest.raises(UserError, match="not those that were published"):
        download.pull("food-vit@best", tmp_path / "out", uri)


@pytest.mark.parametrize("kind", ["link", "suffix", "elsewhere"])
def test_a_registry_that_gives_more_than_a_model_is_refused(
    run: SpooledRun, uri: str, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.artifacts

    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    (tmp_path / "precious").mkdir()
    original = mlflow.artifacts.download_artifacts

    def hostile(*args: Any, **options: Any) -> str:
        folder = Path(original(*args, **options))
        if kind == "link":
            (folder / "README.md").symlink_to("/etc/hostname")
        elif kind == "suffix":
            (folder / "run.py").write_text("print()")
        return str(tmp_path / "precious" if kind == "elsewhere" else folder)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", hostile)
    with pytest.raises(UserError, match="more than the files of a model"):
        download.pull("food-vit@best", tmp_path / "out", uri)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "precious").is_dir()


def test_a_registry_whose_folder_was_copied_reads_and_writes_there(
    run: SpooledRun, uri: str, tmp_path: Path, start: Callable[[], Tracking]
) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    run.file(tmp_path / "model" / "config.json", "things")
    run.finish("FINISHED")
    assert start().close()
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    shutil.copytree(tmp_path / "spool", tmp_path / "spool-copy")
    (tmp_path / "runs").rename(tmp_path / "gone")

    there = f"sqlite:///{tmp_path}/copy/mlflow.db"
    out = download.pull("food-vit@best", tmp_path / "out", there)
    assert sha256(out / "model.safetensors") == sha256(tmp_path / "model" / "model.safetensors")
    with Tracking(there, "food", tmp_path / "spool-copy") as tracking:
        later = tracking.run("later")
        assert registry.publish(later, "food-vit", model(tmp_path / "other", 2.0), {}, "best") == 2
        later.file(tmp_path / "other" / "config.json", "things")
        later.finish("FINISHED")
    assert not (tmp_path / "runs").exists(), "nothing is written to the old place"
    assert len(list((tmp_path / "copy" / "mlartifacts").rglob("config.json"))) == 4
    with sqlite3.connect(tmp_path / "copy" / "mlflow.db") as database:
        for table, column in relocate._COLUMNS:
            rows = database.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL").fetchall()
            assert not [one for (one,) in rows if f"{tmp_path}/runs/" in one], (table, column)


def test_files_that_are_not_beside_the_database_are_not_looked_for_there(
    run: SpooledRun, uri: str, tmp_path: Path
) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    (tmp_path / "other").mkdir()
    shutil.copyfile(tmp_path / "runs" / "mlflow.db", tmp_path / "other" / "mlflow.db")
    there = f"sqlite:///{tmp_path}/other/mlflow.db"
    assert (download.pull("food-vit@best", tmp_path / "a", there) / "config.json").is_file()
    (tmp_path / "other" / "mlartifacts").mkdir()
    assert (download.pull("food-vit@best", tmp_path / "b", there) / "config.json").is_file()
    out = download.pull("food-vit@best", tmp_path / "c", there, str(tmp_path / "runs"))
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("address", "root"),
    [
        ("file:///a/mlartifacts/1/x", "file:///a/mlartifacts"),
        ("file:///a/mlartifacts", "file:///a/mlartifacts"),
        ("s3://b/mlartifacts/p/mlartifacts/x", "s3://b/mlartifacts/p/mlartifacts"),
        ("s3://b/mlartifacts-old/x", None),
        ("mlflow-artifacts:/1/x", None),
    ],
)
def test_roots_of_addresses(address: str, root: str | None) -> None:
    assert relocate.root_of(address) == root


def test_only_models_without_pickles_are_published(run: SpooledRun, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not .*optimizer\.pt"):
        registry.publish(run, "food-vit", folder, {}, "best")
    (folder / "optimizer.pt").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="does not contain a model"):
        registry.publish(run, "food-vit", folder, {}, "best")


@pytest.mark.parametrize(
    "dies_at",
    ["log_model_artifacts", "finalize_logged_model", "log_batch", "log_outputs", "create_model_version"],
)
def test_tries_that_die_halfway_leave_one_logged_model(
    run: SpooledRun,
    client: MlflowClient,
    uri: str,
    tmp_path: Path,
    dies_at: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class DiedError(BaseException):
        pass

    def die(*args: Any, **options: Any) -> None:
        raise DiedError

    folder, facts = model(tmp_path / "model"), registry.Facts(kind="vit", metrics={"accuracy": 0.5})
    registry.publish(run, "other-vit", model(tmp_path / "other"), LINEAGE, "best", facts=facts)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, dies_at, die)
        for _ in range(2):
            with pytest.raises(DiedError):
                registry.publish(run, "food-vit", folder, LINEAGE, "best", facts=facts)
    assert registry.publish(run, "food-vit", folder, LINEAGE, "best", facts=facts) == 1

    experiment = client.get_experiment_by_name("food")
    assert experiment is not None
    models = client.search_logged_models([experiment.experiment_id])
    assert sorted((one.name, str(one.status)) for one in models) == [
        ("food-vit", "READY"),
        ("other-vit", "READY"),
    ]
    known = client.get_run(run.mlflow_run_id() or "")
    assert len(known.outputs.model_outputs) == 2
    assert len(client.get_metric_history(known.info.run_id, "food-vit/accuracy")) == 1
    out = download.pull("food-vit@best", tmp_path / "out", uri)
    assert sha256(out / "model.safetensors") == sha256(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["set_registered_model_tag", "set_registered_model_alias"])
def test_two_that_publish_at_the_same_moment_both_succeed(
    run: SpooledRun,
    client: MlflowClient,
    uri: str,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put, refused = getattr(MlflowClient, name), []

    def beaten(self: MlflowClient, *args: Any) -> None:
        put(self, *args)
        if args not in refused:  # as the one of two says that came later
            refused.append(args)
            raise MlflowException(
                "(sqlite3.IntegrityError) UNIQUE constraint failed: registered_model_tags.key"
            )

    monkeypatch.setattr(MlflowClient, name, beaten)
    assert registry.publish(run, "food-vit", model(tmp_path / "model"), LINEAGE, "best") == 1
    assert refused
    assert client.get_registered_model("food-vit").aliases == {"best": 1}
    assert LINEAGE.items() <= client.get_registered_model("food-vit").tags.items()


def test_tags_of_the_model_are_those_of_its_newest_version(
    run: SpooledRun, client: MlflowClient, uri: str, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    content = model_files.content_digest({path.name: sha256(path) for path in folder.iterdir()})
    other = {**LINEAGE, "dataset": "stamps"}

    def found(tags: dict[str, str], alias: str) -> str | None:
        return registry.difference(uri, "food-vit", content, tags, alias)

    registry.publish(run, "food-vit", folder, LINEAGE, "best")
    client.set_registered_model_tag("food-vit", "dataset", "plants")
    assert found(LINEAGE, "best") == "the tags of food-vit differ from those of its version 1"
    client.delete_registered_model_tag("food-vit", "dataset")
    assert found(LINEAGE, "best") == "the tags of food-vit differ from those of its version 1"
    assert registry.publish(run, "food-vit", folder, LINEAGE, "best") == 1
    assert found(LINEAGE, "best") is None

    # Two stages that publish under one name have nothing to mend in turn.
    registry.publish(run, "food-vit", folder, other, "candidate")
    assert registry.publish(run, "food-vit", folder, LINEAGE, "best") == 1
    assert (found(LINEAGE, "best"), found(other, "candidate")) == (None, None)
    assert client.get_registered_model("food-vit").tags == other


def damage(uri: str, how: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
    if how == "garbage":
        path.write_bytes(b"garbage" * 1000)
        return
    with sqlite3.connect(path) as change:
        if how == "old":
            change.execute("update alembic_version set version_num = '451aebb31d03'")
        else:
            change.execute("drop table registered_models")


@pytest.mark.parametrize(
    ("how", "hint"),
    [("garbage", "restore a copy"), ("old", "mlflow db upgrade sqlite:///"), ("half", "restore a copy")],
)
def test_a_database_that_cannot_be_used_is_named(uri: str, tmp_path: Path, how: str, hint: str) -> None:
    damage(uri, how)
    with pytest.raises(UserError) as caught:
        registry.difference(uri, "food-vit", "", {}, "best")
    assert uri.removeprefix("sqlite:///") in caught.value.what
    assert hint in (caught.value.hint or "")
    assert len(caught.value.what.splitlines()) == 1
    with pytest.raises(UserError) as caught:
        download.pull("food-vit@best", tmp_path / "out", uri)
    assert uri.removeprefix("sqlite:///") in caught.value.what


@pytest.mark.parametrize(
    "error", [RuntimeError("no route to {}"), ModuleNotFoundError("no {}"), KeyError("{}")]
)
def test_an_address_is_named_without_its_secrets(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "postgresql://me:hush-hush@db.example/mlflow"

    def refuse(uri: str) -> MlflowClient:
        raise type(error)(str(error.args[0]).format(uri))

    monkeypatch.setattr(registry, "connect", refuse)
    with pytest.raises(UserError) as caught:
        registry.difference(address, "food-vit", "", {}, "best")
    assert "db.example/mlflow" in caught.value.what
    assert "hush" not in caught.value.what + str(caught.value)


def test_publishing_needs_tracking(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracking is off"):
        registry.publish(NullRun(), "food-vit", model(tmp_path / "model"), {}, "best")
    unreachable = Tracking("http://127.0.0.1:9", "food", tmp_path / "spool")
    with pytest.raises(UserError, match="has not answered for"):
        registry.publish(unreachable.run("x"), "food-vit", tmp_path / "model", {}, "best", timeout=0.1)


def test_a_folder_that_cannot_be_made_is_one_error(run: SpooledRun, uri: str, tmp_path: Path) -> None:
    registry.publish(run, "food-vit", model(tmp_path / "model"), {}, "best")
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", tmp_path / ("a" * 300)):
        with pytest.raises(UserError, match="cannot be"):
            download.pull("food-vit@best", out, uri)


def test_a_pipe_in_place_of_the_database_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.db")
    with pytest.raises(UserError, match="not a regular file"):
        download.pull("food-vit@best", tmp_path / "out", f"sqlite:///{tmp_path}/f.db")


def test_what_an_alias_names_is_downloaded_once_and_never_replaced(
    run: SpooledRun, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    registry.publish(run, "food-vit", model(tmp_path / "a"), LINEAGE, "best")
    version, first = download.cached("food-vit@best", uri, cache)
    assert (version.name, version.number) == ("food-vit", "1")
    assert (load_file(first / "model.safetensors")["weight"] == 1.0).all()
    with monkeypatch.context() as patched:
        patched.setattr(download, "pull", lambda *arguments: pytest.fail("downloaded again"))
        assert download.cached("food-vit/1", uri, cache) == (version, first)
    registry.publish(run, "food-vit", model(tmp_path / "b", 2.0), LINEAGE, "best")
    _, second = download.cached("food-vit@best", uri, cache)
    assert (load_file(second / "model.safetensors")["weight"] == 2.0).all()
    assert (load_file(first / "model.safetensors")["weight"] == 1.0).all()
    with pytest.raises(UserError, match="no model 'food-vat' in the registry"):
        download.cached("food-vat@best", uri, cache)
