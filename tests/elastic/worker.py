"""A real self-supervised job from a spec, and a line that records it: what a worker without Ray runs (see lab.py)."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.config.elastic import Elastic
from orchestrator.data.blocks import Block
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.ssl.config import SelfSupervised
from orchestrator.stages.ssl.gram_anchor import GramAnchor
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.stages.ssl.probe_photos import ProbePhotos
from orchestrator.stages.ssl.task import SelfSupervisedTask
from orchestrator.teacher_service import payload
from orchestrator.training.job import Job
from orchestrator.training.task import BlockTensors, Losses


class Recorder:
    """A line that keeps the metrics and asks the group to yield after a number of steps, or dies at a step."""

    def __init__(self, stop_after: int | None, die_at: int | None = None, troubles: bool = False) -> None:
        self.stop_after, self.die_at, self.may_have_troubles = stop_after, die_at, troubles
        self.troubles: list[str] = []
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.held_out: dict[int, dict[str, float]] = {}
        self.done = 0

    def phase(self, name: str) -> None: ...

    def report(
        self, step: int, metrics: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        self.metrics.append((step, metrics))
        if held_out:
            self.held_out[step] = dict(held_out)
        if step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        self.held_out[step] = dict(held_out)

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, metrics: dict[str, float]) -> None: ...

    def trouble(self, what: str) -> None:
        assert self.may_have_troubles, what
        self.troubles.append(what)

    def stop_requested(self) -> bool:
        self.done += 1
        return self.stop_after is not None and self.done >= self.stop_after


class Ailing(SelfSupervisedTask):
    """Its dense health is what the test says, step by step."""

    def __init__(self, *args: Any, script: Sequence[tuple[float, float]]) -> None:
        super().__init__(*args)
        self.script = script

    def _health(self, block: BlockTensors, out: dict[str, Tensor]) -> dict[str, Tensor]:
        cosine, locality = self.script[block.step]
        return {"cls_patch_cosine": torch.tensor(cosine), "patch_locality": torch.tensor(locality)}


class Spiky(SelfSupervisedTask):
    """Some blocks, `[step, block]`, have a finite loss and a gradient that is not; some a loss that is not."""

    def __init__(
        self,
        *args: Any,
        gradients: Sequence[Any] = (),
        losses: Sequence[Any] = (),
        memory: Sequence[Any] = (),
    ) -> None:
        super().__init__(*args)
        self.bad_gradients, self.bad_losses, self.no_memory = gradients, losses, memory

    def losses(self, block: BlockTensors, target: Any) -> Losses:
        found, place = super().losses(block, target), [block.step, block.index]
        total = found.total
        if place in self.no_memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if place in self.bad_gradients:
            total = total + (total - total.detach()).sqrt()  # sqrt'(0) is infinite
        if place in self.bad_losses:
            total = total + torch.inf
        return Losses(total, found.metrics)


class TaughtBlocks:
    """A step's parts as blocks, computed here: what a student gets from the teacher service."""

    def __init__(self, teacher: Any, num_blocks: int) -> None:
        self.num_blocks, self._teacher = num_blocks, teacher
        self._held: tuple[int, Any] = (-1, None)

    def load(self, step: int, index: int) -> Block:
        if self._held[0] != step:
            self._held = step, self._teacher(step)
        arrays: dict[str, Any] = {}
        ids = None
        for part in self._held[1].values():
            said, found = payload.block(part, index, self.num_blocks)
            ids, arrays = ids if said is None else said, arrays | found
        assert ids is not None
        return Block(step, index, ids, arrays)


class Clock:
    """What stands in the place of `time`: it moves when told to alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


CLOCK = Clock()
LOOK_S = 100.0


class SlowBlocks:
    """Blocks that take `LOOK_S` by `CLOCK` each, and nothing else takes any time."""

    def __init__(self, blocks: Any) -> None:
        self.num_blocks, self._blocks = blocks.num_blocks, blocks

    def load(self, step: int, index: int) -> Block:
        CLOCK.now += LOOK_S
        block: Block = self._blocks.load(step, index)
        return block


def make_feature_job(spec: dict[str, Any]) -> Job:
    """The student of `spec`'s first name, taught by the headless teachers of its objective."""
    from orchestrator.stages.distill.config import Distill
    from orchestrator.stages.distill.feature_task import FeatureTask
    from orchestrator.stages.distill.feature_teacher import FeatureTeacher, prepare
    from orchestrator.stages.distill.features import FeatureObjective
    from orchestrator.stages.distill.step_views import StepViews

    config = Distill.model_validate(spec["config"])
    objective = FeatureObjective.model_validate(spec["features"])
    recipe = ModelRecipe.model_validate(spec["recipe"])
    views = partial(StepViews, config, recipe, Path(spec["index"]), 7, {payload.VIEWS: config.crops})
    num_blocks = config.batch_size // config.block_size
    prepared = prepare(config, objective, views, cache=Path(spec["cache"]))
    return Job(
        name="test",
        task=partial(
            FeatureTask, config, next(iter(config.students.values())), objective, prepared.shapes, 7
        ),
        blocks=lambda: TaughtBlocks(FeatureTeacher(config, objective, views, prepared), num_blocks),
        num_blocks=num_blocks,
        num_steps=config.steps,
        optimizer=config.optimizer,
        zero_stage=spec.get("zero_stage", 3),
        precision="fp32",
        work=Path(spec["work"]),
        seed=0,
        elastic=Elastic(checkpoint_every_s=1e9, exact=spec.get("exact", False)),
    )


def make_job(spec: dict[str, Any]) -> Job:
    if "features" in spec:
        return make_feature_job(spec)
    kind: type[SelfSupervised] = {"pretrain": Pretrain, "gram_anchor": GramAnchor}[spec["config"]["kind"]]
    config = kind.model_validate(spec["config"])
    recipe = ModelRecipe.model_validate(spec["recipe"])
    gram = Path(spec["gram"]) if spec.get("gram") else None
    task = partial(SelfSupervisedTask, config, recipe, 7, gram)
    if spec.get("health"):
        task = partial(Ailing, config, recipe, 7, gram, script=spec["health"])
    if spec.get("spikes"):
        task = partial(Spiky, config, recipe, 7, gram, **spec["spikes"])
    held_out = partial(crop_blocks, config, recipe, Path(spec["index"]), 7, held_out=True)
    validation = (lambda: SlowBlocks(held_out())) if spec.get("slow_look") else held_out
    return Job(
        name="test",
        task=task,
        blocks=partial(crop_blocks, config, recipe, Path(spec["index"]), 7),
        num_blocks=config.batch_size // config.block_size,
        num_steps=config.steps,
        optimizer=config.optimizer,
        zero_stage=spec.get("zero_stage", 3),
        precision=spec.get("precision", "fp32"),
        work=Path(spec["work"]),
        seed=0,
        elastic=Elastic(
            checkpoint_every_s=spec.get("checkpoint_every_s", 1e9),
            exact=spec.get("exact", False),
            max_skipped_updates=spec.get("max_skipped_updates", 10),
        ),
        start_from=Path(spec["start_from"]) if spec.get("start_from") else None,
        max_unreadable=spec.get("max_unreadable"),
        validation=validation if config.validate_every else None,
        validate_every=config.validate_every,
        probe=partial(ProbePhotos.of, Path(spec["index"]), config.knn, config.crops.global_size)
        if config.knn is not None
        else None,
        probe_every=config.knn.every if config.knn is not None else 0,
        export_steps=tuple(spec.get("export_steps", ())),
    )
