"""Photos that cannot be read count once for the whole stage: over its workers, and over its restarts."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from orchestrator.data.blocks import Block
from orchestrator.data.index import ImageIndex
from orchestrator.elastic.channel import Message
from orchestrator.elastic.worker import SlotBlocks
from orchestrator.elastic.worker_slot import WorkerSlot
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.teacher_service import payload
from orchestrator.teacher_service.shared_blocks import SharedBlocks

from .conftest import CONFIG, RECIPE, RunJob

LOST = (3, 11, 20)
# Each process by itself would go on with any number.
ANY = {"max_unreadable": 1.0}


@pytest.fixture
def damaged(index: Path, tmp_path: Path) -> Path:
    """The index, three of whose photos were damaged since."""
    photos, rows = tmp_path / "photos", []
    photos.mkdir()
    whole = ImageIndex.load(index)
    for number in range(len(whole)):
        row = whole[number]
        shutil.copy(Path(row.root) / row.path, photos / row.path)
        if number in LOST:
            (photos / row.path).write_bytes(b"no picture")
        rows.append(replace(row, root=str(photos)))
    folder = tmp_path / "damaged"
    folder.mkdir()
    ImageIndex(rows).save(folder)
    return folder


@pytest.fixture
def met(damaged: Path) -> list[set[int]]:
    """The rows that were met after each step, by the source itself."""
    config, recipe = Pretrain.model_validate({**CONFIG, **ANY}), ModelRecipe.model_validate(RECIPE)
    source, found, so_far = crop_blocks(config, recipe, damaged, 7), [], set[int]()
    for step in range(config.steps):
        for block in range(source.num_blocks):
            so_far = so_far | set(source.load(step, block).unreadable.tolist())
        found.append(so_far)
    assert found[-1] == set(LOST)
    assert len(found[0]) < len(LOST), "else there is nothing to remember"
    return found


def manifest(work: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / f"checkpoints/step-{step:08d}/checkpoint.json").read_text())
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_the_limit_is_one_for_all_workers(
    run_job: RunJob, damaged: Path, met: list[set[int]], tmp_path: Path, world: int
) -> None:
    common = {"config": ANY, "index": damaged, "spikes": {}}
    whole = run_job(tmp_path / "whole", world, max_unreadable=3, **common)
    assert whole["complete"]
    assert manifest(tmp_path / "whole", CONFIG["steps"])["unreadable"] == list(LOST)
    ended = run_job(tmp_path / "ended", world, max_unreadable=2, **common)
    assert len(ended["metrics"]) == next(step for step, rows in enumerate(met) if len(rows) > 2)
    assert (
        "test: 3 photos could not be read since the stage began, and max_unreadable allows 2"
        in ended["error"]
    )
    assert all(f"{row:02}.png" in ended["error"] for row in LOST)


def test_a_restart_forgets_none(run_job: RunJob, damaged: Path, met: list[set[int]], tmp_path: Path) -> None:
    """Each attempt is of one step, with another number of workers, and meets few photos."""
    common = {"config": ANY, "index": damaged, "spikes": {}, "max_unreadable": 2}
    ends = next(step for step, rows in enumerate(met) if len(rows) > 2)
    for step in range(ends):
        run_job(tmp_path, 1 + step % 3, stop_after=1, **common)
        assert set(manifest(tmp_path, step + 1)["unreadable"]) == met[step]
    ended = run_job(tmp_path, 2, stop_after=1, **common)
    assert "3 photos could not be read since the stage began" in ended["error"]


def test_students_hear_of_what_their_teachers_and_slots_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the teachers' blocks over a step's outputs, a student's source and its slot to its worker."""
    taught = [
        Block(0, number, np.full(2, number), {}, unreadable=np.array(rows, np.int64))
        for number, rows in enumerate([[7], [], [8, 9]])
    ]
    said = {**payload.samples(taught), "dino": np.zeros((2, 6, 3), np.float32)}
    assert "step/unreadable" not in payload.samples(taught[1:2]), "as it was where nothing was met"
    (chunk,) = payload.chunks(said, 3, 3)
    own = Block(0, 1, np.zeros(2, np.int64), {"globals": np.zeros((2, 2, 3))}, unreadable=np.array([5]))
    source = SharedBlocks("coordinator", "student", 3, own=Mock(load=lambda step, index: own))
    monkeypatch.setattr(source, "_chunk", lambda step, part, index: (chunk, index, 3))

    def answer(step: int, index: int) -> Message:
        """What the slot sends."""
        sent: list[Message] = []
        channel = Mock(send=lambda body, fd: sent.append(Message(body, fd=os.dup(fd))))
        request = Message({"step": step, "index": index})
        WorkerSlot._load(Mock(), source, channel, request)
        return sent[0]

    block = SlotBlocks(Mock(load=answer), 3).load(0, 1)
    assert sorted(block.unreadable.tolist()) == [5, 7, 8, 9]
    assert block.ids.tolist() == [1, 1]
    assert set(block.arrays) == {"dino", "globals"}
