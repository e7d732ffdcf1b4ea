"""Fine-tuning with LoRA tells groups of food apart better than k-NN and a linear probe of the same frozen backbone.

The backbone is the DINOv2 relative of `python -m orchestrator.data.weights dinov2-focus`. The stage's own `run` trains,
with the real loop in one worker in this process; only Ray is left out. Each seed has a split of its own. Everything is
chosen on validation and reported on test: the step of fine-tuning, k of k-NN, and the strength of the probe. Settings
of the three modes were frozen before the seeds of the claim were looked at (docs/finetune.md).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from bench._silent import Silent
from bench._torchvision import mend_torchvision
from bench.harness import Claim, cpu_seconds, summarize
from bench.learning import sets
from orchestrator.config.elastic import Elastic
from orchestrator.data.index import ImageIndex
from orchestrator.data.weights import DINOV2_FOCUS, fetch
from orchestrator.stages.base import Context
from orchestrator.stages.finetune.config import SCORES, Finetune
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

Floats = NDArray[np.float32]

_CLASSES = 10
_SIZE = 84
_MODES: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {
        "mode": "lora",
        "lora": {"rank": 16, "alpha": 32, "targets": ["attention", "mlp"]},
        "optimizer": {"lr": {"peak": 2e-3}, "layer_decay": 0.75},
    },
    "full": {"mode": "full", "optimizer": {"lr": {"peak": 2e-4}, "layer_decay": 0.75}},
    "frozen": {"mode": "frozen", "optimizer": {"lr": {"peak": 1e-2}}},
}


@dataclass(frozen=True)
class Plan:
    """How much is trained: updates, images of one, and the seeds of splits and training."""

    steps: int
    batch: int
    seeds: tuple[int, ...]


FULL = Plan(steps=60, batch=32, seeds=(11, 12, 13))
QUICK = Plan(steps=2, batch=16, seeds=(1,))


def run(quick: bool) -> Claim:
    """Three seeds of each arm; one of few steps in the quick run, whose figures mean nothing."""
    mend_torchvision()
    plan = QUICK if quick else FULL
    weights = cache_folder() / "dinov2-focus"
    fetch(DINOV2_FOCUS, weights)
    found: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        index = Path(place) / "index"
        index.mkdir()
        ImageIndex([replace(row, component="all") for row in sets.pictures("food")]).save(index)
        for seed in plan.seeds:
            sizes = {}
            for arm, settings in _MODES.items():
                before = cpu_seconds()
                folder = Path(place) / f"{arm}-{seed}"
                scores = tuned(_stage(plan, settings, weights, seed), index, folder, seed)
                took.setdefault(arm, []).append(cpu_seconds() - before)
                found.setdefault(arm, []).append(100 * scores["test"]["accuracy"])
                sizes[arm] = scores["trained_parameters"]
                sys.stderr.write(
                    f"seed {seed}, {arm}: {found[arm][-1]:.1f} after {took[arm][-1]:.0f} CPU s\n"
                )
            shares.append(sizes["LoRA"] / sizes["full"])
            for arm, accuracy in plain(
                _stage(plan, _MODES["frozen"], weights, seed), index, Path(place), seed
            ).items():
                found.setdefault(arm, []).append(100 * accuracy)
            said = ", ".join(f"{arm} {values[-1]:.1f}" for arm, values in found.items())
            sys.stderr.write(f"seed {seed}: {said}\n")
    share = 100 * max(shares)
    lora, full = np.array(found["LoRA"]), np.array(found["full"])
    better_plain = np.maximum(found["k-NN"], found["linear probe"])
    return Claim(
        claim="test accuracy of LoRA on 10 groups of food, over the better of k-NN and linear probe of its backbone",
        figure=float(np.mean(lora - better_plain)),
        unit="points",
        goal=0.0,
        limit=None,
        arms={name: summarize(values, took.get(name, ())) for name, values in found.items()},
        notes=(
            "arms are test accuracies in per cent; a range is over seeds, each with a split and a training of its own",
            f"LoRA minus full {np.mean(lora - full):+.1f} points, with {share:.1f} % of its trained weights",
            f"{plan.steps} steps of {plan.batch} images at {_SIZE} pixels; "
            + ", ".join(f"{arm} {np.mean(values):.0f} CPU s" for arm, values in took.items()),
        ),
        better="more",
    )


def _stage(plan: Plan, settings: Mapping[str, Any], weights: Path, seed: int) -> Finetune:
    optimizer = settings["optimizer"]
    schedule = {"warmup_steps": plan.steps // 10, "shape": "cosine", **optimizer["lr"]}
    return Finetune.model_validate(
        {
            "kind": "finetune",
            "task": {"type": "classification", "classes": _CLASSES, "label_smoothing": 0.1},
            "network": {"transformers": str(weights)},
            "split": {"by": "hash", "seed": seed, "validation_share": 0.2, "test_share": 0.3},
            "steps": plan.steps,
            "batch_size": plan.batch,
            "block_size": 16,
            "image_size": _SIZE,
            "validate_every": max(1, plan.steps // 4),
            **settings,
            "optimizer": {"weight_decay": 0.01, **optimizer, "lr": schedule},
        }
    )


def tuned(stage: Finetune, index: Path | None, folder: Path, seed: int) -> dict[str, Any]:
    """What a run of the stage says of its splits; `index` is None for a task with a data set of its own."""
    from orchestrator.elastic import trainer

    with patch.object(trainer, "run", _train):
        stage.run(_context(index, folder, seed))
    scores: dict[str, Any] = json.loads((folder / "out" / SCORES).read_text())
    return scores


def plain(stage: Finetune, index: Path, folder: Path, seed: int) -> dict[str, float]:
    """k-NN and a linear probe by scikit-learn on frozen features of the same images, chosen on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, classes, labelled = _features(stage, index, folder / f"plain-{seed}", seed)

    def best(models: list[Any], of: Floats) -> float:
        fitted = [model.fit(of[labelled.train], classes[labelled.train]) for model in models]
        scores = [model.score(of[labelled.validation], classes[labelled.validation]) for model in fitted]
        return float(fitted[int(np.argmax(scores))].score(of[labelled.test], classes[labelled.test]))

    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=10.0**power, max_iter=2000))
        for power in range(-5, 2)
    ]
    votes = [KNeighborsClassifier(k, weights="distance", metric="cosine") for k in (1, 3, 5, 10, 20)]
    dim = features.shape[1] // 2
    both = {"CLS": features[:, :dim], "CLS and mean": features}
    return {
        "k-NN": max(best(votes, part) for part in both.values()),
        "linear probe": max(best(probes, part) for part in both.values()),
    }


def _features(stage: Finetune, index: Path, folder: Path, seed: int) -> tuple[Floats, NDArray[np.int64], Any]:
    """CLS and the mean of the patches of every image of the index that has a class, by row; and its classes."""
    import torch

    from orchestrator.models import normalise
    from orchestrator.stages.finetune.blocks import split_blocks
    from orchestrator.stages.finetune.run import labelled_rows
    from orchestrator.stages.finetune.start import starting_backbone

    context = _context(index, folder, seed)
    labelled = labelled_rows(stage, context, ImageIndex.load(index))
    count = len(ImageIndex.load(index))
    classes = np.full(count, -1, dtype=np.int64)
    with starting_backbone(stage, context) as start, torch.inference_mode():
        backbone = start.open().eval()
        features = np.zeros((count, 2 * backbone.dim), np.float32)
        for name in ("train", "validation", "test"):
            blocks = split_blocks(stage, index, labelled, name, start.image_size)
            for at in range(blocks.num_blocks):
                block = blocks.load(0, at)
                found = backbone(normalise(torch.from_numpy(block.arrays["images"])))
                features[block.ids] = torch.cat([found.cls, found.patches.mean(dim=1)], dim=-1).numpy()
                classes[block.ids] = block.arrays["classes"]
    return features, classes, labelled


def _context(index: Path | None, folder: Path, seed: int) -> Context:
    (folder / "out").mkdir(parents=True)
    (folder / "work").mkdir()
    manifest = Manifest(kind="curate", key="1" * 64, created="", files={}, provenance={}, summary={})
    return Context(
        name="finetune",
        pipeline="bench",
        seed=seed,
        key="0" * 64,
        inputs={} if index is None else {"index": Artifact("1" * 64, "curate", index, manifest)},
        keys={},
        sources={},
        out=folder / "out",
        work=folder / "work",
        elastic=Elastic(workers=(1, 1), checkpoint_every_s=1e6, device="cpu"),
        run=NullRun(),
    )


class _Line(Silent):
    """The controller's side: it keeps the figures."""

    def __init__(self, run: NullRun) -> None:
        self._run = run

    def report(
        self, step: int, figures: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        self._run.metrics(figures, step)
        if held_out:
            self.looked(step, held_out)

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        self._run.metrics(held_out, step, channel="val")


def _train(job: Any, *, tracker: Any, stop: Any) -> dict[str, float]:
    """In the place of Ray Train: the loop itself, with this process as a group of one worker."""
    from bench._one_worker import join_group
    from orchestrator.training import loop

    join_group()
    loop.train(job, _Line(tracker))
    return {}
