"""`distill` from headless teachers as a stage: real jobs on a real cluster, students as artifacts of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.stages.base import Context
from orchestrator.stages.distill.config import Distill
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

from .small import BASE

# What a user writes; BatchNorm is measured when the student is done.
_OWN = """
from torch import nn

def make(width):
    stem = nn.Conv2d(3, width, 8, 8), nn.BatchNorm2d(width), nn.GELU(), nn.Dropout(0.1)
    return nn.Sequential(*stem, nn.Conv2d(width, 12, 1))
"""


def stage(tmp_path: Path, *students: str, **features: Any) -> Distill:
    return Distill.model_validate(
        {
            **BASE,
            "kind": "distill",
            "steps": 4,
            "students": {
                "vit": {"model": "vit_femto"},
                "cnn": {"model": "convnext_mini", "views": {"global_size": 48}},
                "own": {"module": "own_cnn:make", "kwargs": {"width": 16}},
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


@pytest.mark.long
def test_two_teachers_teach_three_architectures(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes where the machine is busy: it starts a cluster and warms slots."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "own_cnn.py").write_text(_OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "nets"))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path / "nets"), os.environ.get("PYTHONPATH"))))
    )
    config = stage(tmp_path, repeat_after=3)
    config.check()
    with cluster.start(Cluster(), Distill.preload):
        figures = config.run(context)
    counted = json.loads((context.out / "sharing.json").read_text())
    # The views of the fourth step are those of the first.
    assert counted["images_forwarded"] == 3 * config.batch_size
    assert counted["images_needed"] == 4 * config.batch_size
    assert json.loads((context.out / "drawn.json").read_text())["draws"] == 3 * config.batch_size
    for name, student in config.students.items():
        folder = context.out / "students" / name
        net: Any = orchestrator.load(folder, trust_module="own_cnn").module
        assert net.patch_size == (build(student.model).patch_size if student.model else 8)
        if not student.model:
            assert (net.net[1].running_var - 1).abs().max() > 0.01, "measured"
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


def test_messages_point_into_the_stage(context: Context, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be imported") as caught:
        stage(tmp_path, teachers={"a": {"module": "no_such.nets:make"}}).check()
    assert caught.value.where == "features.teachers.a.module"
    found = stage(tmp_path).files()
    assert found["features.teachers.a.from"] == (
        tmp_path / "vit_femto" / "config.json",
        tmp_path / "vit_femto" / "model.safetensors",
    )
