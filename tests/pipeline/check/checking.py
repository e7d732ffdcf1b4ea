"""A pipeline that is checked before its first step, for tests of what is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.pipeline.check.pipeline_check import Checked, check
from orchestrator.pipeline.cost import memory_and_disk
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice

PHOTOS = 12
TRAINING = {
    "steps": 20, "batch_size": 4, "block_size": 2,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 0.001}},
}  # fmt: skip
PIPELINE = {
    "name": "known",
    "elastic": {"workers": 1},
    "data": {"photos": {"path": "photos", "captions": "captions.csv"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 2},
        "pretrain": {"kind": "pretrain", "needs": "curate", "model": "vit_femto", "snapshot_every": 8, **TRAINING},
        "gram": {"kind": "gram_anchor", "needs": ["curate", "pretrain"], "gram": {"teacher": 16}, **TRAINING},
        "distill": {
            "kind": "distill", "needs": ["curate", "gram"], **TRAINING,
            "students": {"small": {"model": "vit_femto"}, "tiny": {"model": "vit_femto"}},
        },
        "align": {"kind": "align_text", "needs": ["curate", "distill"], "student": "small", "steps": 2,
                  "batch_size": 4, "block_size": 2},
        "evaluate": {"kind": "evaluate", "needs": ["curate", "gram", "distill", "align"]},
        "publish": {"kind": "publish", "needs": ["distill", "evaluate"], "names": ["small"]},
    },
}  # fmt: skip


def checked(*overrides: str, runs: bool = True, choice: Choice = EVERYTHING) -> Checked:
    return check(load("pipeline.yaml", overrides, needs_data=False, gather=True), runs=runs, choice=choice)


def told(errors: list[UserError]) -> str:
    return "\n".join(str(error) for error in errors)


def line_of(text: str) -> int:
    """The line of the pipeline file that has a text."""
    lines = Path("pipeline.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def machine(monkeypatch: pytest.MonkeyPatch, *, disk: float = 1e12, memory: float = 1e12) -> None:
    monkeypatch.setattr(memory_and_disk, "_free_disk", lambda folder: int(disk))
    monkeypatch.setattr(memory_and_disk, "_free_memory", lambda: int(memory))
    monkeypatch.setattr(memory_and_disk, "_SHARED", Path("/"))
