"""Any model is published, whatever stage says that it made it: names, tags, cards, and that it can be loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

import orchestrator
from orchestrator.config.schema import DataSource
from orchestrator.errors import UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.keys.cache_key import key_parts
from orchestrator.pipeline.load import load
from orchestrator.stages.base import Context
from orchestrator.stages.common.scores import read_scores
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.publish.config import Publish
from orchestrator.storage.artifacts import Artifact
from orchestrator.tracking import download
from orchestrator.tracking.run import NullRun, Run, Tracking

from .evaluating import make_text
from .registries import NUM_PHOTOS, K, Maker, artifact, backbone, context, evaluation, rows

CAPTIONS = ["a red one", "a green one", "blue"] * 20
COMMAND = "orchestrator run food.yaml stages.high_res.steps=7"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[str, Tracking]]:
    folder = tmp_path_factory.mktemp("any")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    shutil.copyfile(empty_database, folder / "mlflow.db")
    with Tracking(uri, "any", folder / "spool") as tracking:
        yield uri, tracking


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A backbone, a pair of towers and two models of a kind that nobody knows, in artifacts that say what they are."""
    folder = tmp_path_factory.mktemp("made")
    backbone(folder / "high_res" / "model", 1)
    for number, name in enumerate(("one", "two")):
        backbone(folder / "finetune" / name, 10 + number)
    make_text(folder / "text", folder / "high_res" / "model", CAPTIONS)
    (folder / "curate").mkdir()
    curated = artifact(
        "curate", "c" * 64, folder / "curate", {}, data={"photos": "f" * 64, "gone": "a" * 64},
        summary={"images": 1542.0, "unique": 1463.0},
    )  # fmt: skip
    index = {"index": curated.key}
    return {
        "curate": curated,
        "models.high_res": artifact(
            "high_res", "a" * 64, folder / "high_res", index, command=COMMAND, upstream={"curate": "c" * 64}
        ),
        "models.text": artifact("align_text", "b" * 64, folder / "text", index),
        "models.mine": artifact("finetune", "e" * 64, folder / "finetune", {"backbone": "a" * 64}),
    }


STAGES = {
    "models.high_res": Maker(kind="high_res", made={"": "model"}),
    "models.text": Maker(kind="align_text", made={"": "aligned"}),
    "models.mine": Maker(kind="finetune", made={"one": "one", "two": "two"}),
}


def attempt(folder: Path, pipeline: str, run: Run, made: dict[str, Artifact], *roles: str) -> Context:
    place = folder / pipeline
    (place / "out").mkdir(parents=True)
    table: dict[str, Any] = {
        "knn": {"k": K, "num_photos": NUM_PHOTOS, "rows": rows()},
        "metrics": {
            "miou": {"high_res, step 6 (teacher)": {"miou": 0.5}, "random vit_femto, 16 px": {"miou": 0.25}}
        },
        "retrieval": {"num_pairs": 60.0, "image_to_text_recall_at_5": 0.5, "chance_recall_at_5": 0.1},
        "zero_shot": {"accuracy": 0.75, "majority": 0.34},
    }
    evaluated = evaluation(
        place / "evaluation", table, {"high_res": "a" * 64, "text": "b" * 64, "index": "c" * 64}, "9" * 64
    )
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(place / "evaluation" / "pca_teacher.png")
    return context(
        place, pipeline, run, {role: made[role] for role in roles}, STAGES, evaluated,
        {"photos": DataSource(path=Path("photos"), licence="CC-BY-4.0 | by many")},
        {"curate": made["curate"], "high_res": made["models.high_res"]},
    )  # fmt: skip


def test_all_kinds_of_models_are_published_and_load(
    tracked: tuple[str, Tracking], tmp_path: Path, made: dict[str, Artifact]
) -> None:
    uri, tracking = tracked
    now = attempt(tmp_path, "kinds", tracking.run("publish"), made, *STAGES)
    stage = Publish(kind="publish")
    assert stage.run(now) == {"published": 4.0}
    assert stage.drift(now, uri) == []
    models = json.loads((now.out / "models.json").read_text())
    assert {name: entry["model"] for name, entry in models.items()} == {
        "high_res": "vit_femto", "text": "align_text", "mine-one": "vit_femto", "mine-two": "vit_femto",
    }  # fmt: skip
    assert len({entry["sha256"] for entry in models.values()}) == 4

    client = MlflowClient(uri, uri)
    tags = client.get_model_version_by_alias("kinds-high_res", "champion").tags
    assert (tags["orchestrator.stage"], tags["orchestrator.key"]) == ("high_res", "a" * 64)
    assert tags["orchestrator.knn_accuracy"] == "0.4700", "the row of its last step"
    assert client.get_model_version_by_alias("kinds-mine-two", "champion").tags["orchestrator.name"] == "two"
    assert "orchestrator.student" not in tags

    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 30, 3), dtype=np.uint8)).save(photo)
    for name, width in (("kinds-high_res", None), ("kinds-mine-one", None), ("kinds-text", 12)):
        model = orchestrator.load(download.pull(f"{name}@champion", tmp_path / name, uri))
        vector = orchestrator.embed(model, str(photo))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
        assert width is None or vector.shape == (width,)
    assert (tmp_path / "kinds-high_res" / "features.png").read_bytes() == (
        tmp_path / "kinds" / "evaluation" / "pca_teacher.png"
    ).read_bytes()


def card_of(
    tracked: tuple[str, Tracking], folder: Path, made: dict[str, Artifact], pipeline: str, role: str
) -> str:
    uri, tracking = tracked
    now = attempt(folder, pipeline, tracking.run("publish"), made, role)
    Publish(kind="publish").run(now)
    name = f"{pipeline}-{role.removeprefix('models.')}"
    return (download.pull(f"{name}@champion", folder / name, uri) / "README.md").read_text()


def test_the_card_has_data_evaluation_and_the_command(
    tracked: tuple[str, Tracking], tmp_path: Path, made: dict[str, Artifact]
) -> None:
    text = card_of(tracked, tmp_path, made, "card", "models.high_res")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["pipeline_tag"] == "image-feature-extraction"
    assert (front["license"], front["library_name"]) == ("other", "dinov3-orchestrator")
    assert {"dinov3", "vit_femto"} <= set(front["tags"])
    # sqrt(0.47 · 0.53 / 400) is 0.025.
    assert "| **this model** | **0.470 ± 0.025** |" in text
    assert "| random weights of the same model | 0.410 ± 0.025 |" in text
    assert "| raw pixels | 0.430 ± 0.025 |" in text
    assert "| always the largest group | 0.250 ± 0.022 |" in text
    assert "| miou | 0.5 | 0.25 |" in text
    assert "is not above" not in text
    assert "![Photos and the feature maps of this model](features.png)" in text
    assert "| photos | 1,542, 1,463 without duplicates | CC-BY-4.0 \\| by many |" in text
    assert "gone" not in text, "a source that the file no longer has"
    assert f"    {COMMAND}\n" in text
    assert f"| key | {'a' * 64} |" in text
    assert re.findall(r"\| key\.(\w+) \|", text) == ["curate"], "what led to it, and not what came of it"
    assert str(tmp_path) not in text


def test_a_model_that_loses_to_raw_pixels_says_so(
    tracked: tuple[str, Tracking], tmp_path: Path, made: dict[str, Artifact]
) -> None:
    uri, tracking = tracked
    now = attempt(tmp_path, "loser", tracking.run("publish"), made, "models.high_res")
    table = tmp_path / "loser" / "evaluation" / "table.json"
    record = json.loads(table.read_text())
    for row in record["knn"]["rows"]:
        row["accuracy"] = 0.43 if "teacher" in row["name"] else row["accuracy"]
    table.write_text(json.dumps(record))
    Publish(kind="publish").run(now)
    text = (download.pull("loser-high_res@champion", tmp_path / "out", uri) / "README.md").read_text()
    assert "**This model is not above raw pixels.**" in text


def test_figures_of_test_photos_are_not_called_leave_one_out(
    tracked: tuple[str, Tracking], tmp_path: Path, made: dict[str, Artifact]
) -> None:
    uri, tracking = tracked
    now = attempt(tmp_path, "split", tracking.run("publish"), made, "models.high_res")
    table = tmp_path / "split" / "evaluation" / "table.json"
    record = json.loads(table.read_text()) | {"split": {"train": 900, "validation": 300, "test": NUM_PHOTOS}}
    for row in record["knn"]["rows"]:
        note = "k=20, validation 0.481" if "teacher" in row["name"] else "k=1, validation 0.400"
        row["figure"] = {"value": row["accuracy"], "note": note}
    table.write_text(json.dumps(record))
    Publish(kind="publish").run(now)
    text = (download.pull("split-high_res@champion", tmp_path / "out", uri) / "README.md").read_text()
    said = (
        f"Accuracy of a vote of the nearest training photos, on {NUM_PHOTOS} test photos; validation photos chose the "
        "number of neighbours (k=20, validation 0.481); ± is one standard error."
    )
    assert said in text
    assert "leave-one-out" not in text
    version = MlflowClient(uri, uri).get_model_version_by_alias("split-high_res", "champion")
    assert version.tags["orchestrator.knn"] == f"test photos, k=20, validation 0.481, n={NUM_PHOTOS}"


@pytest.mark.parametrize("role", ["models.text", "models.mine"])
def test_the_code_of_every_card_runs(
    tracked: tuple[str, Tracking],
    tmp_path: Path,
    made: dict[str, Artifact],
    role: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri, tracking = tracked
    pipeline = f"code-{role[-4:]}"
    now = attempt(tmp_path, pipeline, tracking.run("publish"), made, role)
    Publish(kind="publish", names="mine-one" if "mine" in role else ()).run(now)
    name = f"{pipeline}-{'mine-one' if 'mine' in role else 'text'}"
    text = (download.pull(f"{name}@champion", tmp_path / name, uri) / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    if "text" in role:
        assert found["similarity"].shape == (2,)
        assert "| zero_shot | 0.75 | 0.34 |" in text
        assert "![Photos" not in text
    else:
        assert found["patches"].ndim == 3
        assert "This model was not evaluated." in text


def test_models_are_chosen_by_name(
    tracked: tuple[str, Tracking], tmp_path: Path, made: dict[str, Artifact]
) -> None:
    _, tracking = tracked
    now = attempt(tmp_path, "names", tracking.run("publish"), made, *STAGES)
    assert Publish(kind="publish", names=("mine-two", "text")).run(now) == {"published": 2.0}
    entries = json.loads((now.work / "published.json").read_text())
    assert [entry["name"] for entry in entries] == ["names-mine-two", "names-text"]
    with pytest.raises(UserError, match="no model 'mine-tow'") as caught:
        Publish(kind="publish", names="mine-tow").run(now)
    assert caught.value.hint == "did you mean 'mine-two'?"
    two = replace(
        now,
        inputs={**now.inputs, "students": now.inputs["models.high_res"]},
        stages={**STAGES, "students": Maker(kind="distill", made={"high_res": "model"})},
        names={**now.names, "students": "distill"},
    )
    with pytest.raises(UserError, match="two models would be published as 'high_res'"):
        Publish(kind="publish").run(two)
    nothing = replace(now, inputs={}, stages={}, names={}, run=NullRun())
    with pytest.raises(UserError, match="no model to publish"):
        Publish(kind="publish").run(nothing)


def test_the_scores_of_a_backbone_are_those_of_its_last_step(tmp_path: Path) -> None:
    table = {
        "knn": {"k": K, "num_photos": NUM_PHOTOS, "rows": rows(vit=0.3)},
        "metrics": {"rank": {"pretrain, step 12": {"rank": 1.0}, "pretrain, step 36": {"rank": 2.0}}},
    }
    pretrain = artifact("pretrain", "1" * 64, tmp_path, {})
    found = evaluation(tmp_path / "labels", table, {"pretrain": "1" * 64}, "9" * 64)
    scores = read_scores(found, pretrain, "")
    assert scores is not None
    assert scores.metrics == {"knn": 0.44, "rank": 2.0, "rank/rank": 2.0}
    assert read_scores(found, artifact("pretrain", "2" * 64, tmp_path, {}), "") is None, "of another run"
    table["knn"] = {"k": K, "num_photos": 0, "rows": []}
    unlabelled = read_scores(
        evaluation(tmp_path / "none", table, {"pretrain": "1" * 64}, "9" * 64), pretrain, ""
    )
    assert unlabelled is not None
    assert unlabelled.metrics == {"rank": 2.0, "rank/rank": 2.0}


# --- in a pipeline file -------------------------------------------------------------------------------------------

FILE = """\
name: any
data: {photos: {path: ., licence: CC0}}
stages:
  curate: {kind: curate, data: photos}
  base:
    kind: pretrain
    needs: curate
    model: vit_femto
    steps: 2
    batch_size: 4
    block_size: 2
    optimizer: {lr: {peak: 1.0e-3}}
  evaluate: {kind: evaluate, needs: [curate, base]}
  publish: {kind: publish, needs: [NEEDS]}
"""


def test_each_model_fills_a_role_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(FILE.replace("NEEDS", "base, evaluate"))
    assert dag.roles(load(path, needs_data=False))["publish"] == {
        "evaluation": "evaluate",
        "models.base": "base",
    }
    path.write_text(FILE.replace("NEEDS", "base, curate"))
    with pytest.raises(UserError, match="'curate' of kind curate, which is not an input") as caught:
        dag.roles(load(path, needs_data=False))
    assert "models (any stage that makes a model)" in (caught.value.hint or "")


def test_keys_of_files_from_before_are_as_they_were() -> None:
    """Computed by the version before conditions and models of any kind."""
    parts = key_parts(Publish(kind="publish"), inputs={"students": "a", "evaluation": "b"}, data={}, seed=0)
    assert parts.model_dump(mode="json") == {
        "kind": "publish", "version": 1, "config": {"alias": "champion", "names": []},
        "inputs": {"students": "a", "evaluation": "b"}, "data": {}, "seed": 0, "format": 2,
    }  # fmt: skip
    gated = Publish.model_validate({"kind": "publish", "conditions": "knn >= 0.4"})
    assert key_parts(gated, inputs={}, data={}, seed=0).config["conditions"] == ["knn >= 0.4"]


def test_evaluate_says_what_it_computes_of_which_kind() -> None:
    evaluate = Evaluate(kind="evaluate")
    assert {evaluate.scored(kind) for kind in ("pretrain", "distill", "finetune")} == {("knn",)}
    assert "zero_shot" in evaluate.scored("align_text")
    assert evaluate.scored("curate") == ()
