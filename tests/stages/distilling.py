"""A tiny distillation that several tests share: its stage, its teacher, and what a worker gets of a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.views import CropConfig
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.stages.distill.task import FrozenTeacher
from orchestrator.teacher_service.payload import TEACHER, VIEWS, Parts, block
from orchestrator.training.task import BlockTensors

HEADS = Heads(
    hidden=24, dino_bottleneck=8, dino_prototypes=32, ibot_bottleneck=8, ibot_prototypes=48, prototype_std=0.3
)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=32)
CONFIG = Distill.model_validate(
    {
        "kind": "distill", "students": {"small": {"model": "vit_femto"}, "other": {"model": "convnext_mini"}},
        "steps": 3, "batch_size": 8, "block_size": 4, "optimizer": {"lr": {"peak": 1e-3}},
        "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    }
)  # fmt: skip


def photographs(folder: Path, count: int, size: tuple[int, int], kind: str, seed: int) -> Path:
    """The folder of an index of `count` smooth pictures of `size` (width, height), in files of that kind."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), size)
        cv2.imwrite(str(folder / f"{number}.{kind}"), pixels)
        rows.append(ImageRecord("photos", f"{number}.{kind}", str(folder), "", *size))
    (folder / "index").mkdir()
    ImageIndex(rows).save(folder / "index")
    return folder / "index"


def frozen_teacher(
    config: Distill, teacher: Path, index: Path, views: dict[str, CropConfig] | None = None
) -> FrozenTeacher:
    sets = {VIEWS: config.crops} if views is None else views
    return FrozenTeacher(config, RECIPE, teacher, partial(StepViews, config, RECIPE, index, 5, sets))


def tensors_of(
    parts: Parts, step: int, index: int, names: tuple[str, ...] = (TEACHER, VIEWS)
) -> BlockTensors:
    """A block as the student's worker gets it."""
    arrays = {name: array for part in names for name, array in block(parts[part], index, 2)[1].items()}
    return BlockTensors(step, index, 1.0, {name: torch.from_numpy(array) for name, array in arrays.items()})
