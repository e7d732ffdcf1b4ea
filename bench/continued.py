"""Going on from a trained backbone on other pictures: k-NN and dense health over the steps, anchored and not.

A ViT that a DINOv2 relative and EfficientNet-Lite0 taught on stamps and food goes on, by itself, on photographs of food
alone. At each look there are the k-NN that training watches, its dense health, and k-NN on the stamps that it sees no
more. The arms differ in the learning rate, in layer-wise decay and in the Gram term, in nothing else
(`docs/continue.md`).
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from time import process_time
from typing import TYPE_CHECKING, Any

from bench._silent import Silent
from bench.harness import Claim, summarize

if TYPE_CHECKING:
    from bench.distil.train import Plan
    from orchestrator.stages.ssl.pretrain import Pretrain

KNN, COSINE, LOCALITY, BEFORE = "k-NN", "CLS–patch cosine", "patch locality", "k-NN, stamps"
FIGURES = (KNN, BEFORE, COSINE, LOCALITY)
_HIGH = {"optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 40}}}
_WILD = {"optimizer": {"lr": {"peak": 1e-2, "warmup_steps": 40}}}
_GRAM = {"gram": {"weight": {"peak": 2.0}}}
# Name → what the stage has besides the common settings.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "high rate": _HIGH,
    "high rate, anchored": {**_HIGH, **_GRAM},
    "low rate, anchored": {
        "optimizer": {"lr": {"peak": 5e-5, "warmup_steps": 60}, "layer_decay": 0.75},
        **_GRAM,
    },
    "wild rate": _WILD,
    "wild rate, anchored": {**_WILD, **_GRAM},
}
# Before it was run.
PREDICTED = (
    "high rate: k-NN on food falls by more than 0.05 within 100 steps after the backbone is released, since new heads "
    "teach a batch of 16; the cosine rises by more than 0.1",
    "high rate, anchored: cosine and locality stay within 0.05 of the start; k-NN falls too, but by less",
    "low rate, anchored: k-NN and dense health stay within 0.02 of the start",
    "wild rate: k-NN falls by more than 0.05; anchored by less than half of that",
)
_SIZE, _BATCH = 64, 16
_MODEL = "vit_nano"


@dataclass(frozen=True)
class Sizes:
    """How much is done: steps of each arm, those in which the backbone is frozen, and steps between looks."""

    steps: int
    frozen: int
    every: int


FULL, QUICK = Sizes(120, 30, 30), Sizes(6, 2, 2)
Curve = dict[str, dict[int, float]]
"""Values of each figure by step."""


def run(quick: bool, seed: int = 0, start: Path | None = None) -> Claim:
    """Teach a start, and go on from it in each arm; a process each, of one thread.

    Args:
        quick: a few steps, which shows that everything works and nothing else.
        seed: of everything that is random.
        start: a folder of the same model to go on from; default: it is taught.
    """
    from bench.distil import train

    sizes = QUICK if quick else FULL
    weights = train.fetch_all()
    with (
        tempfile.TemporaryDirectory() as work,
        ProcessPoolExecutor(len(ARMS), multiprocessing.get_context("spawn")) as pool,
    ):
        if start is None:
            start, spent = pool.submit(_start, weights, quick, seed, Path(work)).result()
            sys.stderr.write(f"the start: {spent:.0f} s of a core\n")
        jobs = {arm: pool.submit(_arm, arm, start, sizes, seed) for arm in ARMS}
        curves: dict[str, Curve] = {}
        for arm, job in jobs.items():
            curves[arm], spent = job.result()
            sys.stderr.write(f"{arm}: {spent:.0f} s of a core\n")
    sys.stderr.write(table(curves))
    return Claim(
        claim="continued pretraining keeps what the starting backbone knew, if it is anchored and slow",
        figure=_change(curves["low rate, anchored"][KNN]),
        unit=f"change of {KNN} from the start to the end",
        goal=-0.02,
        limit=None,
        arms={
            f"{arm}: {name}": summarize([_change(curve[name])])
            for arm, curve in curves.items()
            for name in FIGURES
        },
        notes=[
            *(f"predicted: {one}" for one in PREDICTED),
            *(
                f"measured, {arm}: {name} "
                + " ".join(f"{step}:{value:.3f}" for step, value in curve[name].items())
                for arm, curve in curves.items()
                for name in FIGURES
            ),
        ],
        better="more",
    )


def table(curves: Mapping[str, Curve]) -> str:
    """Markdown: a row for each arm and figure, a column for each look."""
    steps = list(next(iter(curves.values()))[KNN])
    lines = [f"| arm | figure | {' | '.join(map(str, steps))} |", "|---" * (2 + len(steps)) + "|"]
    for arm, curve in curves.items():
        lines += [
            f"| {arm} | {name} | {' | '.join(f'{curve[name][step]:.3f}' for step in steps)} |"
            for name in FIGURES
        ]
    return "\n".join(lines) + "\n"


def _change(values: Mapping[int, float]) -> float:
    return values[max(values)] - values[min(values)]


def config_of(arm: str, start: Path, sizes: Sizes) -> Pretrain:
    """The stage of an arm."""
    from bench.learning.ground import CROPS, HEADS, TEMPERATURE
    from orchestrator.stages.ssl.pretrain import Pretrain

    return Pretrain.model_validate(
        {
            "kind": "pretrain",
            "from": start,
            "freeze_backbone_steps": sizes.frozen,
            "steps": sizes.steps,
            "batch_size": _BATCH,
            "block_size": _BATCH,
            "crops": {**CROPS, "num_local": 2},
            "ema": {"peak": 0.97},
            "teacher_temperature": {"peak": TEMPERATURE},
            "heads": HEADS,
            "knn": {"every": sizes.every},
            **_within(ARMS[arm], sizes),
        }
    )


def _within(settings: Mapping[str, Any], sizes: Sizes) -> Mapping[str, Any]:
    """With a warmup that the steps have room for."""
    optimizer = settings["optimizer"]
    warmup = min(optimizer["lr"]["warmup_steps"], sizes.steps)
    return {**settings, "optimizer": {**optimizer, "lr": {**optimizer["lr"], "warmup_steps": warmup}}}


# --- in processes of their own ------------------------------------------------------------------------------------


def _start(weights: Mapping[str, Path], quick: bool, seed: int, work: Path) -> tuple[Path, float]:
    """A folder of the backbone to go on from; and the seconds of processor that it took."""
    from bench._torchvision import mend_torchvision
    from bench.distil import train

    began = process_time()
    mend_torchvision()
    plan: Plan = train.QUICK if quick else replace(train.FULL, views=1, steps=300)
    made = train.distilled(weights, plan, seed, work, kinds=("ViT",))
    return made.folders["ViT"], process_time() - began


def _arm(arm: str, start: Path, sizes: Sizes, seed: int) -> tuple[Curve, float]:
    """What an arm was like at each look; and the seconds of processor that it took."""
    from bench._one_worker import join_group
    from bench.learning import measure, sets
    from orchestrator.config.elastic import Elastic
    from orchestrator.data.index import ImageIndex
    from orchestrator.models import load_pretrained
    from orchestrator.stages.common.crops import crop_blocks
    from orchestrator.stages.ssl.probe_photos import ProbePhotos
    from orchestrator.stages.ssl.task import SelfSupervisedTask
    from orchestrator.training import loop
    from orchestrator.training.job import Job

    began = process_time()
    join_group()
    config = config_of(arm, start, sizes)
    recipe = config.model_recipe()
    assert recipe is not None
    assert config.knn is not None
    stamps = measure.squares(sets.labelled(sets.pictures("stamps")), _SIZE)
    line = _Curves()
    with tempfile.TemporaryDirectory() as folder:
        place, weights = Path(folder), Path(folder) / "start.safetensors"
        ImageIndex(sets.labelled(sets.pictures("food"))).save(place)
        _save_start(load_pretrained(start).state_dict(), weights)
        gram = weights if config.gram is not None else None
        looks = tuple(range(sizes.every, sizes.steps, sizes.every))
        job = Job(
            name=_MODEL,
            task=partial(SelfSupervisedTask, config, recipe, seed, gram, start=weights),
            blocks=partial(crop_blocks, config, recipe, place, seed),
            num_blocks=1,
            num_steps=sizes.steps,
            optimizer=config.optimizer,
            zero_stage=0,
            precision="fp32",
            work=place / "work",
            seed=seed,
            elastic=Elastic(workers=(1, 1), checkpoint_every_s=1e6),
            export_steps=looks,
            probe=partial(ProbePhotos.of, place, config.knn, _SIZE),
            probe_every=sizes.every,
        )
        loop.train(job, line)
        nets = {0: load_pretrained(start)}
        nets |= {step: measure.snapshot(job.export(step), _MODEL) for step in (*looks, sizes.steps)}
        line.curve[BEFORE] = {step: measure.knn_among(stamps, net) for step, net in nets.items()}
    for figure in (COSINE, LOCALITY):
        line.curve[figure] = {step: line.at(figure, step, sizes) for step in nets}
    return line.curve, process_time() - began


def _save_start(state: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({f"backbone.{name}": tensor.contiguous() for name, tensor in state.items()}, path)


class _Curves(Silent):
    """Keeps what a job reports."""

    def __init__(self) -> None:
        self.curve: Curve = {KNN: {}}
        self._health: dict[str, dict[int, float]] = {COSINE: {}, LOCALITY: {}}

    def at(self, figure: str, step: int, sizes: Sizes) -> float:
        """The mean of half the steps before a look; at the start, of all in which the backbone is frozen."""
        first = step - sizes.every // 2 + 1 if step else 1
        return fmean(self._health[figure][one] for one in range(first, (step or sizes.frozen) + 1))

    def report(
        self, step: int, figures: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        self._health[COSINE][step] = figures["cls_patch_cosine"]
        self._health[LOCALITY][step] = figures["patch_locality"]
        if held_out:
            self.looked(step, held_out)

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        self.curve[KNN][step] = held_out["knn"]
