"""Trains the students and the same towers from scratch by the real loop, each job with one worker in this process.

What the teacher says of a step is computed once, kept, and given to all students.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench._one_worker import join_group
from bench._silent import Silent
from bench.learning import ground
from bench.learning.measure import snapshot
from orchestrator.config.elastic import Elastic
from orchestrator.config.schedules import Optimizer
from orchestrator.data.blocks import Block
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.rng import derive
from orchestrator.models import Backbone, efficientnet
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.features import FeatureObjective
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.teacher_service import payload

TEACHER = "lite0"
MODELS = {"ViT": "vit_pico", "ConvNeXt": "convnext_mini"}
SIZE = ground.SIZE
# What the teacher sees of the same boxes: its features are much the same as at its own 224 pixels, at a third of
# the cost.
TEACHER_SIZE = 128
_BATCH = 32
_PART = f"{payload.VIEWS}/{SIZE}"


def _optimizer(steps: int) -> Mapping[str, Any]:
    return {
        "lr": {"peak": 2e-3, "warmup_steps": min(20, steps), "shape": "cosine"},
        "weight_decay": 0.04,
        "layer_decay": 1.0,
        "patch_embed_scale": 1.0,
    }


@dataclass(frozen=True)
class Plan:
    """How much is trained and asked.

    Attributes:
        steps: updates of a distilled tower: one global view of each picture.
        alone_steps: updates of a tower by itself: two global and four local views, so several times the compute.
        seeds: of each model.
        every: every how many pictures one is asked about.
    """

    steps: int
    alone_steps: int
    seeds: int
    every: int


FULL = Plan(steps=300, alone_steps=120, seeds=3, every=1)
QUICK = Plan(steps=8, alone_steps=4, seeds=1, every=12)


def distill_config(plan: Plan) -> Distill:
    """One stage with a student for each model and seed."""
    return Distill.model_validate(
        {
            "kind": "distill",
            "students": {
                f"{model}-{seed}": {"model": model, "views": {"global_size": SIZE}}
                for model in MODELS.values()
                for seed in range(plan.seeds)
            },
            "steps": plan.steps,
            "batch_size": _BATCH,
            "block_size": _BATCH,
            "crops": {
                "global_size": TEACHER_SIZE,
                "local_size": SIZE,
                "num_global": 1,
                "num_local": 0,
                "blur_probability": (0.2, 0.0),
                "flip": True,
            },
            "mask_probability": 0.0,
            "optimizer": _optimizer(plan.steps),
            "ema": {"peak": 0.99},
        }
    )


def objective(weights: Path) -> FeatureObjective:
    """Lite0, by a module path, its features on one scale."""
    return FeatureObjective.model_validate(
        {
            "teachers": {
                TEACHER: {
                    "module": "orchestrator.models.efficientnet:lite0",
                    "weights": weights,
                    "mean": efficientnet.MEAN,
                    "std": efficientnet.STD,
                }
            },
            "whiten": True,
            "dtype": "fp16",
        }
    )


def alone_config(model: str, plan: Plan) -> Pretrain:
    """The same tower by itself, as `bench.learning` pretrains: DINO, iBOT and KoLeo with its own EMA as the teacher."""
    return Pretrain.model_validate(
        {
            "kind": "pretrain",
            "model": model,
            "steps": plan.alone_steps,
            **ground.COMMON,
            "heads": ground.HEADS,
            "frozen_prototype_steps": 5,
            "optimizer": _optimizer(plan.alone_steps),
            "ema": {"start": 0.9, "peak": 0.97, "warmup_steps": plan.alone_steps * 2 // 3},
        }
    )


def distilled(rows: Sequence[ImageRecord], weights: Path, plan: Plan) -> dict[str, Backbone]:
    """All students of :func:`distill_config`, by name."""
    from orchestrator.stages.distill.feature_task import FeatureTask
    from orchestrator.stages.distill.feature_teacher import FeatureTeacher, prepare
    from orchestrator.stages.distill.step_views import StepViews

    config, wanted = distill_config(plan), objective(weights)
    wanted.check(config.crops)
    with tempfile.TemporaryDirectory() as folder:
        ImageIndex(rows).save(Path(folder))
        # Only the masks that nobody asks for hang on the recipe.
        recipe = ModelRecipe(model=MODELS["ViT"], drop_path=0.0, heads=Heads(), global_size=TEACHER_SIZE)
        sets = {_PART: config.crops_of(next(iter(config.students.values())))}
        views = partial(StepViews, config, recipe, Path(folder), derive(0, "views"), sets)
        prepared = prepare(config, wanted, views)
        teacher = FeatureTeacher(config, wanted, views, prepared)
        words = [teacher(step) for step in range(config.steps)]
    nets = {}
    for name, student in config.students.items():
        assert student.model is not None
        seed = derive(0, name)
        task = partial(FeatureTask, config, student, wanted, prepared.shapes, seed)
        nets[name] = trained(task, partial(Kept, words), config.steps, config.optimizer, student.model, seed)
    return nets


def alone(rows: Sequence[ImageRecord], model: str, seed: int, plan: Plan) -> Backbone:
    """A tower from scratch."""
    from orchestrator.stages.common.crops import crop_blocks
    from orchestrator.stages.ssl.task import SelfSupervisedTask

    config = alone_config(model, plan)
    recipe = ModelRecipe(model=model, drop_path=0.0, heads=config.heads, global_size=SIZE)
    with tempfile.TemporaryDirectory() as folder:
        ImageIndex(rows).save(Path(folder))
        own = derive(seed, "alone")
        task = partial(SelfSupervisedTask, config, recipe, own, None)
        blocks = partial(crop_blocks, config, recipe, Path(folder), own)
        return trained(task, blocks, config.steps, config.optimizer, model, own)


class Kept:
    """Blocks of what was said, one a step; after the last one, the first comes again."""

    num_blocks = 1

    def __init__(self, words: Sequence[payload.Parts], part: str = _PART) -> None:
        self._words, self._part = words, part

    def load(self, step: int, index: int) -> Block:
        said, ours = (self._words[step % len(self._words)][part] for part in (payload.TEACHER, self._part))
        ids, features = payload.block(said, index, 1)
        assert ids is not None
        arrays = {**features, **payload.block(ours, index, 1)[1]}
        # The loop's tensors must not be written through to what others read.
        return Block(step, index, ids, {name: np.array(array) for name, array in arrays.items()})


def trained(task: Any, blocks: Any, num_steps: int, optimizer: Optimizer, model: str, seed: int) -> Backbone:
    """A job to its end; the EMA of its backbone."""
    from orchestrator.training import loop
    from orchestrator.training.job import Job

    join_group()
    with tempfile.TemporaryDirectory() as work:
        job = Job(
            name=model,
            task=task,
            blocks=blocks,
            num_blocks=1,
            num_steps=num_steps,
            optimizer=optimizer,
            zero_stage=0,
            precision="fp32",
            work=Path(work),
            seed=seed % 2**31,
            elastic=Elastic(workers=(1, 1), checkpoint_every_s=1e6),
        )
        loop.train(job, Silent())
        return snapshot(job.export(num_steps), model)
