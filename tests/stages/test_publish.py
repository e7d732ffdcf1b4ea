"""Publishing to a real MLflow database: what is pulled is the model, its card and its lineage."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image
from pydantic import ValidationError

from orchestrator.config.elastic import Elastic
from orchestrator.errors import Stopped, UserError
from orchestrator.models import build, load_pretrained, save_pretrained
from orchestrator.stages.base import Context, Stage, figures_of
from orchestrator.stages.publish.config import Publish
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import FileEntry, Manifest
from orchestrator.tracking import download
from orchestrator.tracking.run import NullRun, Run, Tracking

KEYS = {"distill": "d" * 64, "pretrain": "b" * 64, "curate": "c" * 64}
PROVENANCE = {
    "parts": {"inputs": {"index": "c" * 64, "teacher": "b" * 64}},
    "code": {"digest": "0123456789abcdef", "files": {}},
    "made_by": {"dinov3-orchestrator": "0.0.1", "python": "3.9"},
}
SUMMARY = {"femto_last_loss": 1.5, "tiny_last_loss": 2.5, "images_forwarded": 64.0}
SIZE = 16


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[str, Tracking]]:
    """One database for the module."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    shutil.copyfile(empty_database, folder / "mlflow.db")
    with Tracking(uri, "publish", folder / "spool") as tracking:
        yield uri, tracking


class Maker(Stage):
    """A stage that says that it made every student in a folder."""

    kind: str = "distill"
    folder: Path

    def models(self) -> Mapping[str, str]:
        return {path.name: f"students/{path.name}/model" for path in (self.folder / "students").iterdir()}


def artifact(kind: str, key: str, path: Path, provenance: dict[str, object]) -> Artifact:
    manifest = Manifest(kind=kind, key=key, created="", files={}, provenance=provenance, summary=SUMMARY)
    return Artifact(key, kind, path, manifest)


def context(tmp_path: Path, pipeline: str, run: Run) -> Context:
    """Two students, one of which was evaluated."""
    for number, name in enumerate(("femto", "tiny")):
        torch.manual_seed(number)
        folder = tmp_path / "distill" / "students" / name / "model"
        save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": SIZE})
    rows = [{"student": None, "accuracy": 0.9}, {"student": "femto", "accuracy": 0.51234}]
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "table.json").write_text(
        json.dumps({"knn": {"k": 5, "num_photos": 406, "rows": rows}})
    )
    (tmp_path / "out").mkdir()
    return Context(
        name="publish",
        pipeline=pipeline,
        seed=0,
        key="k",
        inputs={
            "students": artifact("distill", "d" * 64, tmp_path / "distill", PROVENANCE),
            "evaluation": artifact("evaluate", "e" * 64, tmp_path / "evaluate", {}),
        },
        keys=KEYS,
        sources={},
        out=tmp_path / "out",
        work=tmp_path / "work",
        elastic=Elastic(),
        run=run,
        stages={"students": Maker(folder=tmp_path / "distill")},
        names={"students": "distill"},
    )


def test_students_are_published_with_lineage_and_pulled(
    tracked: tuple[str, Tracking], tmp_path: Path
) -> None:
    uri, tracking = tracked
    now = context(tmp_path, "food", tracking.run("publish"))
    before = {path: path.read_bytes() for path in (tmp_path / "distill").rglob("*") if path.is_file()}
    assert Publish(kind="publish").run(now) == {"published": 2.0}

    published = json.loads((now.work / "published.json").read_text())
    assert [(entry["name"], entry["version"]) for entry in published] == [("food-femto", 1), ("food-tiny", 1)]
    models = json.loads((now.out / "models.json").read_text())
    assert {name: entry["model"] for name, entry in models.items()} == {
        "femto": "vit_femto",
        "tiny": "vit_femto",
    }
    assert "food" not in (now.out / "models.json").read_text(), "the artifact holds for any registry and name"
    said = Publish(kind="publish").published(now.out, "food")
    assert said == ["food-femto@champion", "food-tiny@champion"]
    for number, reference in enumerate(said):
        assert (download.pull(reference, tmp_path / f"as-said-{number}", uri) / "model.safetensors").is_file()
    assert Publish(kind="publish", conditions="knn > 0.4").published(now.out, "food")[0] == "food-femto"
    version = MlflowClient(uri, uri).get_model_version_by_alias("food-femto", "champion")
    expected = {
        "orchestrator.pipeline": "food",
        "orchestrator.student": "femto",
        "orchestrator.model": "vit_femto",
        "orchestrator.students": "d" * 64,
        "orchestrator.index": "c" * 64,
        "orchestrator.code": "0123456789abcdef",
        "orchestrator.version": "0.0.1",
        "orchestrator.key.pretrain": "b" * 64,
        "orchestrator.key.curate": "c" * 64,
        "orchestrator.knn_accuracy": "0.5123",
        "orchestrator.knn": "leave-one-out, k=5, n=406",
    }
    assert expected.items() <= version.tags.items()
    other = MlflowClient(uri, uri).get_model_version_by_alias("food-tiny", "champion")
    assert "orchestrator.knn_accuracy" not in other.tags

    experiment = MlflowClient(uri, uri).get_run(version.run_id).info.experiment_id
    (model,) = MlflowClient(uri, uri).search_logged_models([experiment], "name = 'food-femto'")
    assert (model.model_type, model.params["student"]) == ("vit_femto", "femto")
    figures = {metric.key: metric.value for metric in model.metrics}
    assert figures == {"food-femto/last_loss": 1.5, "food-femto/knn_accuracy": 0.5123}
    outputs = MlflowClient(uri, uri).get_run(version.run_id).outputs.model_outputs
    assert model.model_id in [output.model_id for output in outputs]

    pulled = download.pull("food-femto@champion", tmp_path / "pulled", uri)
    assert {path.name for path in pulled.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
        "MLmodel",
    }
    theirs = tmp_path / "distill" / "students" / "femto" / "model" / "model.safetensors"
    assert (pulled / "model.safetensors").read_bytes() == theirs.read_bytes()
    # The artifact that it came from is as it was.
    assert before == {path: path.read_bytes() for path in (tmp_path / "distill").rglob("*") if path.is_file()}


def test_the_cards_snippet_runs_as_it_stands(
    tracked: tuple[str, Tracking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, tracking = tracked
    now = context(tmp_path, "snippet", tracking.run("publish"))
    Publish(kind="publish", names="femto").run(now)
    folder = download.pull("snippet-femto@champion", tmp_path / "snippet-femto", uri)
    readme = (folder / "README.md").read_text()
    assert "orchestrator pull snippet-femto@ALIAS --out snippet-femto" in readme
    assert f"| index | {'c' * 64} |" in readme

    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(snippet.strip().splitlines()) <= 10
    pixels = np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(snippet, found)
    dim = load_pretrained(folder).dim
    assert found["vector"].shape == (dim,)
    assert np.linalg.norm(found["vector"]) == pytest.approx(1.0, abs=1e-5)
    assert found["patches"].shape == (1, 4, dim)


def test_again_after_a_crash_makes_no_second_version(tracked: tuple[str, Tracking], tmp_path: Path) -> None:
    _, tracking = tracked
    now = context(tmp_path, "again", tracking.run("publish"))
    # A crash between the two students, and rubbish of it in the working folder.
    Publish(kind="publish", names=("femto",)).run(now)
    (now.work / "femto" / "half.safetensors").write_bytes(b"")
    (now.work / "tiny").mkdir()
    Publish(kind="publish").run(now)
    published = json.loads((now.work / "published.json").read_text())
    assert [(entry["name"], entry["version"]) for entry in published] == [
        ("again-femto", 1),
        ("again-tiny", 1),
    ]


def test_only_the_named_students_under_another_alias(tracked: tuple[str, Tracking], tmp_path: Path) -> None:
    uri, tracking = tracked
    now = context(tmp_path, "some", tracking.run("publish"))
    assert Publish(kind="publish", names="tiny", alias="candidate").run(now) == {"published": 1.0}
    client = MlflowClient(uri, uri)
    names = [model.name for model in client.search_registered_models(max_results=100)]
    assert [name for name in names if name.startswith("some-")] == ["some-tiny"]
    assert int(client.get_model_version_by_alias("some-tiny", "candidate").version) == 1
    assert Publish(kind="publish", names="tiny", alias="prod").run(now) == {"published": 1.0}
    assert int(client.get_model_version_by_alias("some-tiny", "prod").version) == 1, "the same weights"


def test_mistakes_are_named(tmp_path: Path) -> None:
    now = context(tmp_path, "food", NullRun())
    with pytest.raises(UserError, match="no student 'femmto'") as raised:
        Publish(kind="publish", names="femmto").run(now)
    assert (raised.value.where, raised.value.hint) == ("stages.publish.names", "did you mean 'femto'?")
    with pytest.raises(UserError, match="tracking is off"):
        Publish(kind="publish").run(now)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Publish(kind="publish").run(replace(now, stop=stop))
    assert list(now.out.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"alias": ""},
        {"alias": "two words"},
        {"alias": "1"},
        {"alias": "latest"},
        {"alias": "Latest"},
        {"alias": "v1"},
        {"alias": "V12"},
        {"student": "a"},
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Publish.model_validate({"kind": "publish", **wrong})


@pytest.mark.parametrize("alias", ["champion", "version1", "v1a", "latest-good", "v"])
def test_aliases_that_only_look_reserved_are_taken(alias: str) -> None:
    assert Publish(kind="publish", alias=alias).alias == alias


def test_what_the_registry_lacks_is_found_and_mended(tracked: tuple[str, Tracking], tmp_path: Path) -> None:
    uri, tracking = tracked
    client = MlflowClient(uri, uri)
    run = tracking.run("publish")
    now = context(tmp_path, "drift", run)
    stage = Publish(kind="publish")

    def mended() -> None:
        stage.run(replace(now, run=run))
        assert stage.drift(now, uri) == []

    assert stage.drift(now, uri) == [
        f"drift-{name} is not in the registry at {uri}" for name in ("femto", "tiny")
    ]
    mended()
    assert (
        stage.drift(replace(now, pipeline="other"), uri)[0] == f"other-femto is not in the registry at {uri}"
    )
    nowhere = f"sqlite:///{tmp_path}/none.db"
    assert "there is no database" in stage.drift(now, nowhere)[0]
    assert not (tmp_path / "none.db").exists(), "looking makes nothing"

    client.delete_registered_model_alias("drift-femto", "champion")
    assert stage.drift(now, uri) == ["drift-femto version 1 does not have the alias champion"]
    mended()
    client.copy_model_version("models:/drift-tiny/1", "drift-femto")
    client.set_registered_model_alias("drift-femto", "champion", "2")
    assert stage.drift(now, uri) == ["drift-femto@champion is version 2, should be 1"]
    mended()
    client.delete_registered_model("drift-tiny")
    assert stage.drift(now, uri) == [f"drift-tiny is not in the registry at {uri}"]
    mended()
    assert len(client.search_model_versions("name = 'drift-tiny'")) == 1

    weights = tmp_path / "distill" / "students" / "femto" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert stage.drift(now, uri) == ["drift-femto has no version with this content and lineage"]


def test_a_version_whose_alias_is_refused_is_taken_back(
    tracked: tuple[str, Tracking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, tracking = tracked
    now = context(tmp_path, "refused", tracking.run("publish"))
    stage = Publish(kind="publish", names="femto")

    def refuse(*args: object) -> None:
        raise MlflowException("not that one")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_alias", refuse)
        with pytest.raises(UserError, match=r"did not take tags and alias 'champion' of .*: not that one"):
            stage.run(now)
    client = MlflowClient(uri, uri)
    assert client.search_model_versions("name = 'refused-femto'") == []

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_alias", refuse)
        patched.setattr(MlflowClient, "delete_model_version", refuse)
        with pytest.raises(UserError):
            stage.run(now)
    assert stage.drift(now, uri) == ["refused-femto version 2 does not have the alias champion"]
    stage.run(now)
    (version,) = client.search_model_versions("name = 'refused-femto'")
    assert (int(version.version), stage.drift(now, uri)) == (2, [])


def test_a_student_may_have_a_dot_in_its_name(tracked: tuple[str, Tracking], tmp_path: Path) -> None:
    """MLflow takes it in the names of registered models and not in those of logged ones."""
    uri, tracking = tracked
    now = context(tmp_path, "dotted", tracking.run("publish"))
    (tmp_path / "distill" / "students" / "femto").rename(tmp_path / "distill" / "students" / "vit-s.16")
    assert Publish(kind="publish", names="vit-s.16").run(now) == {"published": 1.0}
    assert int(MlflowClient(uri, uri).get_model_version_by_alias("dotted-vit-s.16", "champion").version) == 1


def test_figures_go_to_the_student_of_the_whole_name(tracked: tuple[str, Tracking], tmp_path: Path) -> None:
    uri, tracking = tracked
    now = context(tmp_path, "names", tracking.run("publish"))
    folder = tmp_path / "distill" / "students"
    (folder / "femto").rename(folder / "vit")
    (folder / "tiny").rename(folder / "vit_hr")
    students = now.inputs["students"]
    summary = {"vit_last_loss": 1.0, "vit_hr_last_loss": 2.0, "goodput": 0.5}
    manifest = students.manifest.model_copy(update={"summary": summary})
    inputs = {"students": replace(students, manifest=manifest)}
    run = tracking.run("publish")
    Publish(kind="publish", names="vit").run(replace(now, inputs=inputs, run=run))
    metrics = MlflowClient(uri, uri).get_run(run.mlflow_run_id() or "").data.metrics
    assert metrics == {"names-vit/last_loss": 1.0}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vit", {"loss": 1.0}),
        ("vit_hr", {"loss": 2.0}),
        ("vit_hr_x", {"loss": 3.0}),
        ("vi", {}),
        ("", {"vit_loss": 1.0, "vit_hr_loss": 2.0, "vit_hr_x_loss": 3.0, "goodput": 0.5}),
    ],
)
def test_figures_of_models_whose_names_begin_alike(name: str, own: dict[str, float]) -> None:
    summary = {"vit_loss": 1.0, "vit_hr_loss": 2.0, "vit_hr_x_loss": 3.0, "goodput": 0.5}
    names = ["vit", "vit_hr", "vit_hr_x", "vi"] if name else [""]
    assert figures_of(name, names, summary) == own


def as_published(now: Context) -> Context:
    """The same with the digests of all files of the students in the manifest, as `ArtifactStore.publish` has them."""
    students = now.inputs["students"]
    files = {
        one.relative_to(students.path).as_posix(): FileEntry(
            size=one.stat().st_size, sha256=hashlib.sha256(one.read_bytes()).hexdigest()
        )
        for one in students.path.rglob("*")
        if one.is_file()
    }
    manifest = students.manifest.model_copy(update={"files": files})
    return replace(now, inputs={**now.inputs, "students": replace(students, manifest=manifest)})


@pytest.mark.parametrize("says", [True, False])
def test_an_upgrade_publishes_nothing_anew(
    tracked: tuple[str, Tracking], tmp_path: Path, says: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of students whose artifact is from before artifacts said what made them."""
    uri, tracking = tracked
    now = context(tmp_path, f"upgrade-{says}", tracking.run("publish"))
    if not says:
        now = replace(now, inputs={"students": artifact("distill", "d" * 64, tmp_path / "distill", {})})
    stage = Publish(kind="publish", names="femto")
    stage.run(now)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "99", "0"))
    assert stage.drift(now, uri) == []
    pulled = download.pull(f"upgrade-{says}-femto@champion", tmp_path / "pulled", uri)
    assert ("python_version: '3.9'" in (pulled / "MLmodel").read_text()) == says
    assert ("| version | 0.0.1 |" in (pulled / "README.md").read_text()) == says


def test_weights_are_read_once_to_be_published(
    tracked: tuple[str, Tracking], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes to the registry is compared with what was trained; nothing else has to know digests anew."""
    uri, tracking = tracked
    now = as_published(context(tmp_path, "once", tracking.run("publish")))
    hashed: list[str] = []
    digest_of = hashlib.file_digest

    def count(file: Any, *args: Any) -> Any:
        hashed.append(Path(f"/proc/self/fd/{file.fileno()}").readlink().name)
        return digest_of(file, *args)

    monkeypatch.setattr(hashlib, "file_digest", count)
    Publish(kind="publish", names="femto").run(now)
    assert hashed.count("model.safetensors") == 1
    known = json.loads((now.out / "models.json").read_text())["femto"]["sha256"]
    weights = now.inputs["students"].path / "students" / "femto" / "model" / "model.safetensors"
    assert known == hashlib.sha256(weights.read_bytes()).hexdigest()
    hashed.clear()
    assert Publish(kind="publish", names="femto").drift(now, uri) == []
    assert hashed == []


def test_a_student_that_is_not_what_was_trained_is_not_published(
    tracked: tuple[str, Tracking], tmp_path: Path
) -> None:
    uri, tracking = tracked
    now = context(tmp_path, "bits", tracking.run("publish"))
    students = now.inputs["students"]
    name = "students/femto/model/model.safetensors"
    weights = students.path / name
    entry = FileEntry(size=weights.stat().st_size, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    manifest = students.manifest.model_copy(update={"files": {name: entry}})
    now = replace(now, inputs={**now.inputs, "students": replace(students, manifest=manifest)})
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is not the file that was trained"):
        Publish(kind="publish", names=("femto",)).run(now)
    with pytest.raises(UserError, match="no model 'bits-femto'"):
        download.pull("bits-femto@champion", tmp_path / "out", uri)
