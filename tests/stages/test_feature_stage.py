"""`distill` from headless teachers as a stage: real jobs on a real cluster, students as artifacts of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.errors import UserError
from orchestrator.models import build, load_pretrained, save_pretrained
from orchestrator.stages.base import Context
from orchestrator.stages.distill.config import Distill
from orchestrator.storage.artifacts import Artifact, Manifest
from orchestrator.tracking.run import NullRun

from .small import BASE


def stage(tmp_path: Path, *students: str, **features: Any) -> Distill:
    return Distill.model_validate(
        {
            **BASE,
            "kind": "distill",
            "steps": 4,
            "students": {
                "vit": {"model": "vit_femto"},
                "cnn": {"model": "convnext_mini", "views": {"global_size": 48}},
            }
            if not students
            else {name: {"model": "vit_femto"} for name in students},
            "features": {
                "teachers": {
                    "a": {"from": tmp_path / "vit_femto"},
                    "b": {"from": tmp_path / "convnext_mini", "size": 48, "weight": 0.5},
                },
                "whiten": True,
                "whiten_images": 16,
                **features,
            },
        }
    )


@pytest.fixture
def context(tmp_path: Path, index: Path) -> Context:
    torch.manual_seed(3)
    for name in ("vit_femto", "convnext_mini"):
        save_pretrained(tmp_path / name, build(name).state_dict(), name)
    (tmp_path / "out").mkdir()
    manifest = Manifest(kind="curate", key="f" * 64, created="", files={}, provenance={}, summary={})
    photos = Artifact("f" * 64, "curate", index, manifest)
    return Context(
        name="distill", pipeline="p", seed=0, key="k", keys={}, sources={}, out=tmp_path / "out",
        work=tmp_path / "work", inputs={"index": photos}, elastic=Elastic(workers=1, max_failures=0), run=NullRun(),
    )  # fmt: skip


def test_two_teachers_teach_two_architectures(context: Context, tmp_path: Path) -> None:
    """Minutes where the machine is busy: it starts a cluster and warms slots."""
    config = stage(tmp_path)
    config.check()
    with cluster.start(Cluster(), Distill.preload):
        figures = config.run(context)
    counted = json.loads((context.out / "sharing.json").read_text())
    assert counted["images_forwarded"] == counted["images_needed"] == 4 * config.batch_size
    for name, student in config.students.items():
        folder = context.out / "students" / name
        net = load_pretrained(folder / "model")
        assert net.patch_size == build(student.model).patch_size
        history = json.loads((folder / "history.json").read_text())
        assert {"a_cls", "a_patches", "b_cls", "b_patches"} <= history[0]["metrics"].keys()
        assert figures[f"{name}_last_loss"] < history[0]["metrics"]["loss"]


def test_teachers_from_elsewhere_leave_no_place_for_one_of_the_pipeline(tmp_path: Path) -> None:
    config = stage(tmp_path)
    assert [wanted.role for wanted in config.wants()] == ["index"]
    own = config.model_copy(update={"features": type(config.features)()})
    assert [wanted.role for wanted in own.wants()] == ["index", "teacher"]
    assert [wanted.role for wanted in config.model_copy(update={"features": None}).wants()] == [
        "index",
        "teacher",
    ]


def test_complaints_point_into_the_stage(context: Context, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be imported") as caught:
        stage(tmp_path, teachers={"a": {"module": "no_such.nets:make"}}).check()
    assert caught.value.where == "features.teachers.a.module"
    found = stage(tmp_path).files()
    assert found["features.teachers.a.from"] == (
        tmp_path / "vit_femto" / "config.json",
        tmp_path / "vit_femto" / "model.safetensors",
    )
