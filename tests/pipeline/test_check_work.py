"""What earlier attempts left in the store and the next one cannot use is told before the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import toys

from orchestrator.errors import UserError
from orchestrator.pipeline.check.pipeline_check import check
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.storage.artifacts import folder_name

PIPELINE = """\
name: toy
store: runs/
tracking: {uri: "sqlite:///runs/mlflow.db"}
stages:
  curate: {kind: curate}
  pretrain: {kind: pretrain, needs: curate}
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "toy.yaml"
    path.write_text(PIPELINE)
    return path


def errors(pipeline: Path, *, runs: bool = True, choice: Choice = EVERYTHING) -> Sequence[UserError]:
    loaded = load(pipeline, gather=True, stage_type=toys.ToyStage)
    return check(loaded, runs=runs, choice=choice).errors


def folder_of_stage(pipeline: Path, stage: str) -> str:
    loaded = load(pipeline, gather=True, stage_type=toys.ToyStage)
    found = next(one for one in check(loaded, runs=False).stages if one.name == stage)
    return folder_name(found.parts.kind, found.key)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/step-3"])
@pytest.mark.parametrize("top", ["work", "artifacts"])
def test_a_folder_of_a_stage_that_cannot_be_written(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, top: str, below: str, runs: bool
) -> None:
    place = Path("runs", top, folder_of_stage(pipeline, "pretrain"), below)
    place.mkdir(parents=True)
    assert not errors(pipeline, runs=runs)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not str(path).endswith(str(place)) and access(path, mode)
    )
    (error,) = errors(pipeline, runs=runs)
    assert f"{place} cannot be written, so the store cannot be used" in str(error)
    assert f"{pipeline}:2" in str(error)
    # What is left out now ends nothing now.
    assert not errors(pipeline, runs=runs, choice=Choice(last="curate"))


def test_the_folder_of_a_piece_that_cannot_be_written(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = folder_of_stage(pipeline, "pretrain")
    loaded = load(pipeline, stage_type=toys.ToyStage)
    stage = next(one for one in check(loaded, runs=False).stages if one.name == "pretrain")
    workspace = Workspace("runs")
    workspace.note_piece("pretrain", stage.key, "small", "student", "ab" * 32)
    piece = workspace.work("student", "ab" * 32)
    piece.mkdir(parents=True)
    assert key != piece.name
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != piece and access(path, mode))
    (error,) = errors(pipeline)
    assert f"{piece} cannot be written" in str(error)


@pytest.mark.parametrize("top", ["work", "artifacts"])
@pytest.mark.parametrize("what", ["file", "dangling link", "link"])
def test_what_is_no_folder_where_that_of_a_stage_belongs(pipeline: Path, top: str, what: str) -> None:
    place = Path("runs", top, folder_of_stage(pipeline, "pretrain"))
    place.parent.mkdir(parents=True)
    if what == "file":
        place.write_text("")
    else:
        place.symlink_to(pipeline.parent if what == "link" else "/nowhere")
    found = errors(pipeline)
    if top == "artifacts" and what != "file":
        assert not found, "a run replaces a link in place of an artifact"
        return
    (error,) = found
    assert str(place) in str(error)
    assert "move" in str(error)
