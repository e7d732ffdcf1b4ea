"""A store as training leaves it, made by hand: what is done of a small pipeline, and checkpoints of what trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.numpy import save_file
from torch import nn

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.fsio import sha256_of
from orchestrator.models import build, save_pretrained
from orchestrator.pipeline.keys.cache_key import piece_parts
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.pipeline.plan.stage_plan import resolve
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.training.checkpoint.format import FORMAT, shard_name, step_name

SIZE = 32
_COMMON: dict[str, Any] = {
    "steps": 40, "batch_size": 8, "block_size": 8, "optimizer": {"lr": {"peak": 1e-3}},
}  # fmt: skip
_CROPS = {"crops": {"global_size": SIZE, "local_size": 16, "num_local": 2}}
PIPELINE: dict[str, Any] = {
    "name": "watched",
    "elastic": {"device": "cpu"},
    "data": {"photos": {"path": "photos", "labels": "folders"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 2},
        "pretrain": {"kind": "pretrain", "needs": "curate", "model": "vit_femto", **_COMMON, **_CROPS},
        "distill": {
            "kind": "distill", "needs": ["curate", "pretrain"], **_COMMON, **_CROPS,
            "students": {"small": {"model": "vit_femto"}, "mini": {"model": "convnext_mini", "steps": 20}},
        },
        "tune": {
            "kind": "finetune", "needs": ["curate", "pretrain"], "task": "classification", **_COMMON,
            "mode": "full", "validate_every": 10,
            "split": {"validation_share": 0.3, "test_share": 0.3, "near_duplicate": 1},
        },
        "publish": {"kind": "publish", "needs": ["pretrain", "distill"], "alias": "production"},
    },
}  # fmt: skip


class Store:
    """The pipeline in a folder of its own."""

    def __init__(self, folder: Path, **stages: Any) -> None:
        self.folder = folder
        self.rows = photographs(folder / "photos")
        self.loaded = self.load(**stages)
        self.workspace = Workspace(self.loaded.spec.store)
        self.resolved = {one.name: one for one in resolve(self.loaded)}

    def load(self, **stages: Any) -> LoadedPipeline:
        record = {
            **PIPELINE,
            "store": str(self.folder / "runs"),
            "tracking": {"uri": f"sqlite:///{self.folder / 'mlflow.db'}"},
            "data": {"photos": {"path": str(self.folder / "photos"), "labels": "folders"}},
            "stages": {**PIPELINE["stages"], **stages},
        }
        (self.folder / "pipeline.yaml").write_text(yaml.safe_dump(record, sort_keys=False))
        return load(self.folder / "pipeline.yaml", [])

    def curated(self) -> None:
        """`curate` is done."""
        folder = self.folder / "made-index"
        folder.mkdir()
        ImageIndex(self.rows).save(folder)
        self.publish("curate", folder)

    def pretrained(self, model: nn.Module | None = None) -> None:
        """`pretrain` is done."""
        folder = self.folder / "made-model"
        heads = Heads(hidden=8, dino_bottleneck=4, dino_prototypes=4, ibot_bottleneck=4, ibot_prototypes=4)
        recipe = ModelRecipe(model="vit_femto", drop_path=0.0, heads=heads, global_size=SIZE)
        state = (model or drawn("vit_femto", 1)).state_dict()
        save_pretrained(folder / "model", state, "vit_femto", {"image_size": SIZE})
        (folder / "recipe.json").write_text(recipe.model_dump_json())
        self.publish("pretrain", folder)

    def publish(self, stage: str, folder: Path, piece: tuple[str, Mapping[str, Any]] | None = None) -> None:
        kind, key = self.key_of(stage, piece)
        self.workspace.artifacts().publish(kind, key, folder)
        shutil.rmtree(folder)

    def key_of(self, stage: str, piece: tuple[str, Mapping[str, Any]] | None = None) -> tuple[str, str]:
        parts = self.resolved[stage].parts
        if piece is not None:
            parts = piece_parts(self.loaded.spec.stages[stage], parts, *piece)
        return parts.kind, parts.key

    def student(self, name: str) -> tuple[str, Mapping[str, Any]]:
        return "student", self.loaded.spec.stages["distill"].student_identity(name)  # type: ignore[attr-defined]

    def checkpoint(
        self,
        stage: str,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        piece: tuple[str, Mapping[str, Any]] | None = None,
    ) -> Path:
        """Two workers' checkpoint of these tensors."""
        folder = self.workspace.work(*self.key_of(stage, piece)) / "checkpoints" / step_name(step)
        write_checkpoint(folder, step, tensors)
        return folder


def drawn(model: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(model)


def average(module: nn.Module, prefix: str = "ema/backbone.") -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], world: int = 2
) -> dict[str, Any]:
    """A committed checkpoint; its record."""
    files = {}
    flat = {name: tensor.detach().numpy().reshape(-1) for name, tensor in tensors.items()}
    for rank in range(world):
        path = folder / shard_name("a0001", rank, world)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {}
        for name, values in flat.items():
            size = -(-len(values) // world)
            if len(part := values[rank * size : (rank + 1) * size]):
                parts[name] = np.ascontiguousarray(part)
        save_file(parts, path)
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    record = {
        "format": FORMAT, "step": step, "num_workers": world, "token": "a0001", "updates": step, "files": files,
        "keys": {name: len(values) for name, values in flat.items()}, "meta": {}, "versions": {},
    }  # fmt: skip
    (folder / "checkpoint.json").write_text(json.dumps(record))
    return record


def photographs(folder: Path) -> list[ImageRecord]:
    """Twelve pictures of each of two colours, in folders, and their rows of an index."""
    rng = np.random.default_rng(0)
    rows = []
    for label in ("green", "red"):
        (folder / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 160, (40, 48, 3), dtype=np.uint8)
            pixels[..., label == "green"] += 90
            name = f"{label}/{number}.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append(
                ImageRecord("photos", name, str(folder), sha256_of(folder / name), 48, 40, label=label)
            )
    return rows
