"""Measures what a step costs a teacher and its students: `python -m orchestrator.stages.distill.measure < spec`.

A process of its own, with the environment that workers have: the real teacher on real or made-up photographs, and
the real tasks in the real loop under the real engine, on the teacher's outputs. See `profiling.py`.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch._C._distributed_c10d import FileStore

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.data.blocks import Block, BlockSource
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.stages.base import Context
from orchestrator.stages.common.backbone import save_backbone
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.nets import HeadedBackbone
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.profiling import Spec
from orchestrator.stages.distill.student_config import Student
from orchestrator.stages.distill.teacher_kinds import Teaching, teaching
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.teacher_service.payload import Parts, StepTeacher, block, blocks_per_chunk, chunks
from orchestrator.tracking.run import NullRun
from orchestrator.training.device import CPU, device
from orchestrator.training.job import Job
from orchestrator.training.loop import train
from orchestrator.training.process_group import join

_SEED = 0
# Steps after a first one that does not count: at least so many, and at least for so long, but not too many.
_FEWEST, _ENOUGH_S, _MOST = 6, 5.0, 16
_NUM_PHOTOS = 64
_LONGER_SIDE = 1.5


def main() -> None:
    """Read a `Spec` from standard input, write seconds of steps into its `out` as JSON."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    spec = Spec.model_validate_json(sys.stdin.read())
    if device() == CPU:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="orchestrator-profile-") as scratch:
        join(FileStore(str(spec.meeting), spec.world), spec.rank, spec.world)
        found = _measure(spec, Path(scratch))
    spec.out.write_text(json.dumps(found))
    dist.destroy_process_group()


def _measure(spec: Spec, scratch: Path) -> dict[str, dict[str, float]]:
    """Median seconds of a step, by part (`""` is the teacher) and blocks a step."""
    # Which photographs are drawn does not change what a step costs, and made-up ones are of no source.
    config = Distill.model_validate({**spec.config, "mix": None, "homogeneous": None})
    places = {"index": spec.index or _made_up_photos(config, scratch / "index")}
    if spec.recipe is not None:
        places["teacher"] = spec.teacher or _made_up_teacher(spec.recipe, scratch / "teacher")

    def sized(num_blocks: int) -> Teaching:
        # Replayed, a teacher would only read its outputs of the first time.
        own = {"batch_size": num_blocks * config.block_size, "teacher_cache": False}
        return _teaching(config.model_copy(update=own), places, spec.sources, scratch)

    students = list(config.students.values())
    # Workers that train together write their checkpoint into one folder.
    work = spec.meeting.with_suffix(".work")
    found: dict[str, dict[str, float]] = {}
    if spec.with_teacher:
        found[""] = {
            str(blocks): _teacher_step(sized(blocks).factory(students, _MOST)(), blocks)
            for blocks in spec.blocks
        }
    most = max(spec.blocks)
    parts = sized(most).factory(students, _MOST)()(0)
    for name in spec.students:
        found[name] = {}
        for blocks in spec.blocks:
            teach = sized(blocks)
            source = partial(_Repeated, parts, teach, config.students[name], most, blocks)
            found[name][str(blocks)] = _student_step(
                config, name, teach.task(name, _SEED), source, blocks, work / name / str(blocks)
            )
    return found


def _teaching(
    config: Distill, places: Mapping[str, Path], sources: Mapping[str, DataSource], scratch: Path
) -> Teaching:
    """The stage's own way of making a teacher and tasks, in an attempt that is none."""
    manifest = Manifest(kind="", key="", created="", files={}, provenance={}, summary={})
    context = Context(
        name="profile",
        pipeline="profile",
        seed=_SEED,
        key="",
        inputs={role: Artifact("", role, folder, manifest) for role, folder in places.items()},
        keys={},
        sources=sources,
        out=scratch / "out",
        work=scratch / "work",
        elastic=Elastic(),
        run=NullRun(),
    )
    return teaching(config, context, _SEED)


def _teacher_step(teacher: StepTeacher, num_blocks: int) -> float:
    """With the copies into chunks that travel; not with what Ray does with them."""
    seconds: list[float] = []
    while not _is_enough(seconds):
        began = _clock()
        for part in teacher(len(seconds)).values():
            chunks(part, num_blocks, blocks_per_chunk(part, num_blocks))
        seconds.append(_clock() - began)
    return statistics.median(seconds[1:])


def _student_step(
    config: Distill,
    name: str,
    task: Callable[[], Any],
    source: Callable[[], BlockSource],
    blocks: int,
    work: Path,
) -> float:
    student = config.students[name]
    line = _Stopwatch()
    job = Job(
        name=name,
        task=task,
        num_blocks=blocks,
        num_steps=10 * _MOST,
        optimizer=student.optimizer or config.optimizer,
        zero_stage=student.zero_stage,
        precision=student.precision or config.precision,
        work=work,
        seed=_SEED,
        elastic=Elastic(checkpoint_every_s=3600.0),
        blocks=source,
    )
    train(job, line)
    gc.collect()
    # Worker 0 hears of steps; another one has nothing to say.
    return statistics.median(line.seconds[1:]) if dist.get_rank() == 0 else 0.0


def _clock() -> float:
    """Seconds: of this process's processor time where processors compute, so that nobody else's work is counted."""
    return time.monotonic() if device() != CPU else time.process_time()


def _is_enough(seconds: list[float]) -> bool:
    counted = seconds[1:]
    return len(counted) >= _MOST or (len(counted) >= _FEWEST and sum(counted) >= _ENOUGH_S)


class _Stopwatch:
    """A `TrainerCallback` that reports to nobody and ends the training when enough steps were taken."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._at = _clock()

    def phase(self, name: str) -> None:
        self._at = _clock()

    def report(
        self, step: int, metrics: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        """From one report to the next: with the wait for blocks, should making them take longer than a step."""
        before, self._at = self._at, _clock()
        self.seconds.append(self._at - before)

    def looked(self, step: int, held_out: Mapping[str, float]) -> None: ...

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, metrics: dict[str, float]) -> None: ...

    def trouble(self, what: str) -> None: ...

    def stop_requested(self) -> bool:
        return _is_enough(self.seconds)


class _Repeated:
    """The same blocks in every step, cut from one step of the teacher; a student's own views are made anew."""

    def __init__(
        self, parts: Parts, teach: Teaching, student: Student, cut_into: int, num_blocks: int
    ) -> None:
        self._parts = {name: array for part in teach.parts_of(student) for name, array in parts[part].items()}
        self._cut_into, self.num_blocks = cut_into, num_blocks
        make = teach.own_views(student)
        self._own = make() if make is not None else None

    def load(self, step: int, index: int) -> Block:
        """See :class:`orchestrator.data.blocks.BlockSource`."""
        ids, arrays = block(self._parts, index, self._cut_into)
        assert ids is not None
        if self._own is not None:
            arrays |= self._own.load(step, index).arrays
        return Block(step, index, ids, {name: array.copy() for name, array in arrays.items()})


def _made_up_teacher(recipe: ModelRecipe, folder: Path) -> Path:
    """An artifact of a backbone with random weights: they cost as much as others."""
    (folder / "snapshots").mkdir(parents=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    torch.manual_seed(_SEED)
    state: dict[str, Any] = HeadedBackbone(
        recipe.model, 0.0, recipe.heads, recipe.model_overrides
    ).state_dict()
    export = folder / "snapshots/step-0.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, export)
    save_backbone(export, recipe.model, folder / "model", recipe.global_size, recipe.model_overrides)
    return folder


def _made_up_photos(config: Distill, folder: Path) -> Path:
    """An index of smooth random photographs, half as large again as the largest crop needs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(_SEED)
    height = round(_LONGER_SIDE * config.crops.min_side)
    width = round(height * 4 / 3)
    rows = []
    for number in range(_NUM_PHOTOS):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        cv2.imwrite(
            str(folder / f"{number}.jpg"), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        )
        rows.append(ImageRecord("made-up", f"{number}.jpg", str(folder), "", width, height))
    ImageIndex(rows).save(folder)
    return folder


if __name__ == "__main__":
    main()
