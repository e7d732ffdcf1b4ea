"""What all experiments share: the pictures, the pretrained towers, and how they are scored."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.learning import measure, sets
from bench.learning.lab import Lab, Trained
from bench.learning.measure import LabelledImages, Scenes
from orchestrator.data.index import ImageRecord
from orchestrator.models import Backbone
from orchestrator.stages.ssl.pretrain import Pretrain

POOL = ("food", "stamps", "emoji")
MODEL = "vit_pico"
SIZE = 64
# Milder than the paper's: drawings and cut-outs of two hundred pixels are told apart by colour and outline, and forty
# thousand views are too few to learn in spite of the paper's distortions (`docs/experiments.md`).
CROPS: Mapping[str, Any] = {
    "global_size": SIZE,
    "local_size": SIZE // 2,
    "num_local": 4,
    "global_scale": (0.5, 1.0),
    "local_scale": (0.15, 0.5),
    "blur_sigma": (0.1, 0.6),
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.1,
    "hue": 0.05,
    "gray_probability": 0.1,
    "solarize_probability": 0.0,
}
TEMPERATURE = 0.03
# What is the same in every self-supervised run here. With the paper's temperature, EMA and prototypes a batch of 32
# has targets that differ too little: for hundreds of steps all that is learnt is the uniform distribution.
COMMON: Mapping[str, Any] = {
    "batch_size": 32,
    "block_size": 32,
    "crops": CROPS,
    "ema": {"peak": 0.97},
    "teacher_temperature": {"peak": TEMPERATURE},
    "zero_stage": 1,
}
HEADS: Mapping[str, Any] = {"prototype_std": 0.125, "dino_prototypes": 256, "ibot_prototypes": 256}
_SCENES = 200


class Ground:
    """Pictures and towers of one run of the bench, made when first asked for."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def parts(self, name: str) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """Training and held-out pictures of a set."""
        return sets.split(sets.pictures(name))

    @cached_property
    def pool(self) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """Training and held-out pictures of the three coloured sets together."""
        parts = [self.parts(name) for name in POOL]
        return [row for train, _ in parts for row in train], [row for _, held in parts for row in held]

    @cached_property
    def index(self) -> Trained:
        """The training pictures of the pool."""
        return self.lab.index(self.pool[0])

    def settings(self, steps: int, quick_steps: int, **more: Any) -> dict[str, Any]:
        """A self-supervised stage's fields."""
        return {**COMMON, "steps": quick_steps if self.lab.quick else steps, **more}

    @cached_property
    def base_stage(self) -> Pretrain:
        """How the tower that the other experiments start from is pretrained."""
        return self.from_nothing(MODEL, 1200, 12)

    def from_nothing(self, model: str, steps: int, quick_steps: int) -> Pretrain:
        """Pretraining whose EMA is quick at first, when there is nothing yet worth keeping."""
        warmup = min(20, quick_steps) if self.lab.quick else 20
        fields = self.settings(
            steps,
            quick_steps,
            kind="pretrain",
            model=model,
            heads=HEADS,
            optimizer={"lr": {"peak": 2e-3, "end": 1e-5, "warmup_steps": warmup, "shape": "cosine"}},
            frozen_prototype_steps=5,
        )
        ema = {"start": 0.9, "peak": 0.97, "warmup_steps": fields["steps"] * 2 // 3}
        return Pretrain.model_validate({**fields, "ema": ema, "snapshot_every": fields["steps"] // 3})

    def base(self, seed: int) -> Trained:
        """The tower, pretrained on the pool."""
        return self.lab.train("base", self.base_stage, seed, {"index": self.index})

    def knn_pictures(self, name: str, size: int = SIZE) -> tuple[LabelledImages, LabelledImages]:
        """Training pictures to vote and held-out ones to ask, of a set's large groups."""
        both = [sets.labelled(rows) for rows in self.parts(name)]
        groups = {row.label for row in both[0]} & {row.label for row in both[1]}
        bank, queries = ([row for row in rows if row.label in groups] for rows in both)
        return measure.squares(bank, size), measure.squares(queries, size)

    @cached_property
    def scenes(self) -> tuple[Scenes, Scenes]:
        """Stamps and emoji on food photographs: training ones to vote and held-out ones to ask."""
        stamps, emoji, food = (self.parts(name) for name in ("stamps", "emoji", "food"))
        count = 40 if self.lab.quick else _SCENES
        return (
            measure.scenes(stamps[0] + emoji[0], food[0], count, 0),
            measure.scenes(stamps[1] + emoji[1], food[1], count, 1),
        )

    def patch_score(self, net: Backbone, size: int = SIZE) -> float:
        """Foreground by k-NN of patches (see `measure.patch_knn`)."""
        bank, queries = self.scenes
        return measure.patch_knn(bank.at(size), queries.at(size), net)

    def within_score(self, net: Backbone, size: int = SIZE) -> float:
        """Foreground by the nearest patch of the same held-out picture (see `measure.patch_within`)."""
        return measure.patch_within(self.scenes[1].at(size), net)


def snapshots(trained: Trained) -> dict[int, Path]:
    """The kept EMAs of a stage by the steps it had done."""
    paths = sorted((trained.path / "snapshots").glob("step-*.safetensors"))
    return {int(path.stem.removeprefix("step-")): path for path in paths}


def final(trained: Trained, model: str = MODEL) -> Backbone:
    """A stage's last EMA backbone."""
    found = snapshots(trained)
    return measure.snapshot(found[max(found)], model)
