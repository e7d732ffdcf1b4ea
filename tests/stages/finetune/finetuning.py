"""A small index with labels, and what a stage of fine-tuning gets, for its tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config

from orchestrator.config.elastic import Elastic
from orchestrator.data.index import ImageIndex
from orchestrator.stages.base import Context
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.finetune.run import labelled_rows
from orchestrator.stages.finetune.start import StartingBackbone
from orchestrator.stages.finetune.task import FinetuneTask
from orchestrator.storage.artifacts import Artifact, Manifest
from orchestrator.tracking.run import NullRun

ROOT = Path(__file__).parents[3]
LABELS = ("cat", "dog", "owl")


def config(**overrides: Any) -> Finetune:
    fields: dict[str, Any] = {
        "kind": "finetune", "task": "classification", "steps": 4, "batch_size": 8, "block_size": 4,
        "optimizer": {"lr": {"peak": 1e-3}},
    }  # fmt: skip
    return Finetune.model_validate({**fields, **overrides})


def context(index: Path, folder: Path, **inputs: Path) -> Context:
    def artifact(path: Path) -> Artifact:
        manifest = Manifest(kind="x", key="1" * 64, created="", files={}, provenance={}, summary={})
        return Artifact("1" * 64, "x", path, manifest)

    return Context(
        name="tune", pipeline="test", seed=0, key="0" * 64, sources={}, keys={}, run=NullRun(),
        inputs={"index": artifact(index), **{role: artifact(path) for role, path in inputs.items()}},
        out=folder / "out", work=folder / "work", elastic=Elastic(device="cpu"),
    )  # fmt: skip


def labelled(stage: Finetune, index: Path, tmp_path: Path) -> Any:
    return labelled_rows(stage, context(index, tmp_path), ImageIndex.load(index))


def relabelled(index: Path, **changes: Any) -> Path:
    """The index with a function of row and record in the place of each record's fields."""
    found = ImageIndex.load(index)
    ImageIndex(
        [
            replace(found[row], **{name: change(row, found[row]) for name, change in changes.items()})
            for row in range(len(found))
        ]
    ).save(index)
    return index


def tiny_dinov2() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=16
    )


def exported(stage: Finetune, start: StartingBackbone, path: Path) -> Path:
    """What a job would export: trained weights that differ from those at the start."""
    torch.manual_seed(5)
    task = FinetuneTask(stage, start, LABELS, 0)
    net = task.build("cpu").trainable
    state = {
        name: param.detach() + 0.05 * torch.randn_like(param)
        for name, param in net.named_parameters()
        if param.requires_grad
    }
    net.load_state_dict(state, strict=False)
    save_file(state, path)
    return path
