"""Evaluation of what is not the pipeline's own: models from elsewhere, users' networks, students without a teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from orchestrator.data.index import ImageIndex
from orchestrator.errors import UserError
from orchestrator.evaluation.metrics.knn import knn_leave_one_out
from orchestrator.models.network_spec import NetworkSpec
from orchestrator.models.wrapped_backbone import WrappedBackbone, save_wrapped
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.storage.artifacts import Artifact

from .evaluating import (
    SIZE,
    artifact,
    context,
    make_students,
    one_thread,
    small,
    stage,
)

__all__ = ["one_thread", "small"]


class Colours(torch.nn.Module):
    """A network from elsewhere: the mean colour, which tells the groups apart, on a grid of two by two."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * torch.nn.functional.adaptive_avg_pool2d(x, 2)


def test_models_from_elsewhere_are_rows(small: Context) -> None:
    models = {
        "colours": {"module": f"{__name__}:Colours", "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "early": {"from": str(small.inputs["pretrain"].path / "model"), "block": 1},
    }
    asked = stage(models=models)
    asked.check()
    assert asked.files()["models.early.from"][1].name == "model.safetensors"
    asked.run(small)
    table = json.loads((small.out / "table.json").read_text())
    rows = {row["name"]: row for row in table["knn"]["rows"]}
    own = rows["model colours"]
    assert (own["family"], own["model"], own["image_size"], own["dim"]) == (
        "from elsewhere", f"{__name__}:Colours", 8, 3
    )  # fmt: skip
    assert rows["model early"]["image_size"] == SIZE, "that of the last backbone"
    assert {"pca_model_colours.png", "pca_model_early.png"} <= {path.name for path in small.out.glob("*.png")}

    index = ImageIndex.load(small.inputs["index"].path)
    rows_of = [row for row, label in enumerate(index.labels) if label != "rare"]
    photos = [np.asarray(Image.open(index.path(row)).convert("RGB")) for row in rows_of]
    squares = [np.asarray(ImageOps.fit(Image.fromarray(p), (8, 8), Image.Resampling.BICUBIC)) for p in photos]
    means_ND = np.stack(squares).reshape(len(squares), -1, 3).mean(axis=1).astype(np.float32) / 255
    labels = [str(index.labels[row]) for row in rows_of]
    assert own["accuracy"] == pytest.approx(knn_leave_one_out(means_ND, labels=labels, k=3))


def test_without_a_backbone_models_from_elsewhere_are_evaluated(small: Context) -> None:
    alone = replace(small, inputs={"index": small.inputs["index"]})
    summary = stage(models={"colours": {"module": f"{__name__}:Colours", "size": 8}}).run(alone)
    assert "knn_teacher" not in summary
    assert {path.name for path in small.out.glob("pca*.png")} == {"pca_model_colours.png"}


def test_keys_of_evaluations_that_were_there_before_stay() -> None:
    assert not {"outside", "models"} & stage().identity().keys()
    assert stage(models={"a": {"timm": "b"}}).identity()["outside"]["a"]["timm"] == "b"
    assert stage(models={"a": {"timm": "b"}}).model_dump(mode="json")["models"]["a"]["timm"] == "b"


def test_mistakes_in_models_from_elsewhere(small: Context) -> None:
    with pytest.raises(UserError, match="has nothing called 'Colour'") as caught:
        stage(models={"a": {"module": f"{__name__}:Colour"}}).check()
    assert (caught.value.where, caught.value.hint) == ("models.a.module", f"did you mean {__name__}:Colours?")
    with pytest.raises(UserError, match="the model 'a': it gives") as caught:
        stage(models={"a": {"module": "torch.nn:Flatten", "size": 8}}).run(small)
    assert caught.value.where == "stages.evaluate.models.a"


def own_student(folder: Path) -> Path:
    """A student of a module in the place of one of ours, as `distill` leaves it."""
    students = make_students(folder)
    backbone = WrappedBackbone(NetworkSpec("module", f"{__name__}:Colours"), SIZE)
    shutil.rmtree(students / "students" / "other" / "model")
    save_wrapped(students / "students" / "other" / "model", backbone)
    return students


def test_a_student_that_is_a_users_network(small: Context, tmp_path: Path) -> None:
    """Its module is imported only if the pipeline names it, whatever the folder says."""
    inputs = {**small.inputs, "students": artifact("distill", own_student(tmp_path / "distill"))}
    with pytest.raises(UserError, match="its network is made by"):
        stage().run(replace(small, inputs=inputs))
    named = replace(context(tmp_path, inputs), modules=(f"{__name__}:Colours",))
    stage().run(named)
    rows = {row["name"]: row for row in json.loads((named.out / "table.json").read_text())["knn"]["rows"]}
    assert rows["student other"]["dim"] == 3
    assert rows[f"random {__name__}:Colours"]["accuracy"] == rows["student other"]["accuracy"]


def elsewhere(kind: str, path: Path) -> Artifact:
    """Students whose teachers no stage made, as the driver records it."""
    found = artifact(kind, path)
    parts = {"parts": {"inputs": {"index": "f" * 64}}}
    return replace(found, manifest=found.manifest.model_copy(update={"provenance": parts}))


def test_students_alone_are_scored_and_shown(small: Context, tmp_path: Path) -> None:
    students = elsewhere("distill", make_students(tmp_path / "distill"))
    alone = context(tmp_path, {"index": small.inputs["index"], "students": students})
    summary = stage().run(alone)
    table = json.loads((alone.out / "table.json").read_text())
    assert [row["name"] for row in table["knn"]["rows"]] == [
        "majority group", "raw pixels", "random vit_femto", "student other", "student small",
    ]  # fmt: skip
    assert "knn_small" in summary
    assert "knn_teacher" not in summary
    assert all((alone.out / name).is_file() for name in Evaluate.outputs)
    assert table["dense_health"] == {}
    said = (alone.out / "report.html").read_text()
    assert "Dense health" not in said
    assert {path.stem for path in alone.out.glob("pca_*.png")} == {"pca_other", "pca_small"}


def test_a_backbone_that_taught_nobody_is_not_called_the_teacher(small: Context, tmp_path: Path) -> None:
    students = elsewhere("distill", make_students(tmp_path / "distill"))
    beside = context(tmp_path, {**small.inputs, "students": students})
    summary = stage(num_snapshots=1).run(beside)
    names = [row["name"] for row in json.loads((beside.out / "table.json").read_text())["knn"]["rows"]]
    assert names[3:] == ["pretrain, step 6", "student other", "student small"]
    assert "knn_teacher" not in summary
    assert all((beside.out / name).is_file() for name in Evaluate.outputs)
    assert {path.stem for path in beside.out.glob("pca_*.png")} == {"pca_pretrain", "pca_other", "pca_small"}
