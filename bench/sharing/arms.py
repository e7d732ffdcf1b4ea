"""The arms: a real distillation stage on a local Ray cluster, watched from outside, and plain loops without any."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from PIL import Image

from bench import _plain as plain
from bench.harness import UnfairError
from bench.sharing.gate import WARM_UP, GatedTeacher
from bench.sharing.watching import Measured, Watched, measured, outcome, snapshot, steps_of
from orchestrator.stages.base import Context
from orchestrator.stages.distill.config import Distill
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.teacher_service.payload import VIEWS, StepTeacher
from tools.market import SpotMarket

_POLL_S = 0.05
_PATIENCE_S = 1200.0
_PLACES = 12
_TEACHER = "vit_nano"
_HEADS = {
    "hidden": 256,
    "dino_bottleneck": 64,
    "dino_prototypes": 1024,
    "ibot_bottleneck": 64,
    "ibot_prototypes": 1024,
}
_STAGE: Mapping[str, Any] = {
    "kind": "distill",
    "batch_size": 32,
    "block_size": 16,
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 2}},
    "crops": {"global_size": 64, "local_size": 32, "num_local": 2},
}


@dataclass
class Stand:
    """Photographs and a teacher. A cluster is there only while an arm that needs one is measured."""

    folder: Path
    index: Path
    teacher_folder: Path
    num_runs: int = 0
    errors: list[BaseException] = field(default_factory=list)

    @property
    def images_per_step(self) -> int:
        """Of every student."""
        return int(_STAGE["batch_size"])

    @property
    def num_blocks(self) -> int:
        """Of a step."""
        return int(_STAGE["batch_size"] // _STAGE["block_size"])

    def teacher(self) -> StepTeacher:
        """The teacher, in this process."""
        from orchestrator.stages.common.config import ModelRecipe
        from orchestrator.stages.distill.step_views import StepViews
        from orchestrator.stages.distill.task import FrozenTeacher

        config = _stage({"a": "vit_femto"}, WARM_UP)
        recipe = ModelRecipe.model_validate_json((self.teacher_folder / "recipe.json").read_text())
        views = partial(StepViews, config, recipe, self.index, 0, {VIEWS: config.crops})
        return FrozenTeacher(config, recipe, self.teacher_folder, views)

    def measure(self, students: Mapping[str, str], steps: int) -> Measured:
        """Train all students at once on one teacher, within `cluster()`.

        Measured from when all have done their first steps to when the first one is done, so that all processes
        are at work all the time.
        """
        self.num_runs += 1
        context = self._context(str(self.num_runs))
        thread = threading.Thread(target=self._train, args=(_stage(students, steps), context))
        go = self.folder / f"{self.num_runs}.go"
        with patch("orchestrator.stages.distill.teacher_kinds.FrozenTeacher", partial(GatedTeacher, go)):
            thread.start()
            self._until(lambda: min(steps_of(context, students).values()) >= WARM_UP, thread)
            first = snapshot(context, students)
            go.touch()
            self._until(lambda: max(steps_of(context, students).values()) >= steps - 1, thread)
            last = snapshot(context, students)
            thread.join(_PATIENCE_S)
        if self.errors:
            raise UnfairError(f"an arm failed: {self.errors[0]}") from self.errors[0]
        return measured(first, last, self.images_per_step, *outcome(context))

    def loops_at_once(self, students: Mapping[str, str], steps: int) -> list[plain.Done]:
        """Plain loops of all students at once, of one thread each."""
        return plain.train([self._order(name, students, steps, 1, inline=False) for name in students])

    def loops_in_turn(self, students: Mapping[str, str], steps: int) -> list[plain.Done]:
        """The same one after another, each with all cores."""
        cores = len(os.sched_getaffinity(0))
        return [
            plain.train([self._order(name, students, steps, cores, inline=False)])[0] for name in students
        ]

    def prices(self, students: Mapping[str, str], steps: int) -> dict[str, plain.Price]:
        """What a step costs the teacher and the student in a plain loop that has the machine to itself, by model."""
        one_of = {model: name for name, model in students.items()}
        return {
            model: plain.price(plain.train([self._order(name, students, steps, 1, inline=True)])[0])
            for model, name in one_of.items()
        }

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """A cluster with warm slots; plain loops are to be measured outside it, with the machine to themselves."""
        from orchestrator.config.schema import Cluster
        from orchestrator.elastic import cluster

        # Room for all that an arm has, so that nobody waits for a place that another one keeps.
        with (
            SpotMarket(head_slots=_PLACES) as market,
            cluster.start(Cluster(address=market.address), preload=Distill.preload, prestart=3),
        ):
            yield

    def _order(
        self, name: str, students: Mapping[str, str], steps: int, threads: int, *, inline: bool
    ) -> plain.Order:
        self.num_runs += 1
        return plain.Order(
            stage=_stage(students, steps).model_dump(mode="json", exclude_unset=True),
            student=name,
            recipe=str(self.teacher_folder / "recipe.json"),
            teacher=str(self.teacher_folder),
            index=str(self.index),
            threads=threads,
            inline=inline,
            folder=str(self.folder / f"plain-{self.num_runs}"),
        )

    def _train(self, stage: Distill, context: Context) -> None:
        try:
            stage.run(context)
        except BaseException as error:
            self.errors.append(error)

    def _until(self, condition: Any, thread: threading.Thread) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            if self.errors or time.monotonic() > deadline or not thread.is_alive():
                raise UnfairError(f"an arm ended too early: {self.errors or 'too slow'}")
            time.sleep(_POLL_S)

    def _context(self, name: str) -> Context:
        from orchestrator.config.elastic import Elastic

        folder = self.folder / name
        (folder / "out").mkdir(parents=True)
        return Context(
            name=f"distill-{name}",
            pipeline="bench",
            seed=0,
            key=name,
            inputs={
                "index": _artifact("curate", self.index),
                "teacher": _artifact("pretrain", self.teacher_folder),
            },
            keys={},
            sources={},
            out=folder / "out",
            work=folder / "work",
            elastic=Elastic(workers=(1, 1), checkpoint_every_s=1e6),
            run=Watched(),
        )


@contextmanager
def standing() -> Iterator[Stand]:
    """Everything that arms share; made once."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield Stand(folder, _photographs(folder), _a_teacher(folder))


def _photographs(folder: Path) -> Path:
    from orchestrator.data.index import ImageIndex, ImageRecord
    from orchestrator.data.samples import fetch_food

    photos = folder / "food"
    fetch_food(photos)
    rows = []
    for path in sorted(photos.rglob("*.jpeg")):
        with Image.open(path) as image:
            rows.append(ImageRecord("food", path.name, str(photos), path.name, *image.size))
    (folder / "index").mkdir()
    ImageIndex(rows).save(folder / "index")
    return folder / "index"


def _a_teacher(folder: Path) -> Path:
    """Random weights cost what trained ones do."""
    import torch
    from safetensors.torch import save_file

    from orchestrator.stages.common.config import Heads, ModelRecipe
    from orchestrator.stages.common.nets import HeadedBackbone

    heads = Heads.model_validate(_HEADS)
    torch.manual_seed(0)
    net = HeadedBackbone(_TEACHER, 0.0, heads)
    snapshots = folder / "teacher" / "snapshots"
    snapshots.mkdir(parents=True)
    save_file(net.state_dict(), snapshots / "step-00000001.safetensors")
    recipe = ModelRecipe(model=_TEACHER, drop_path=0.0, heads=heads, global_size=64)
    (folder / "teacher" / "recipe.json").write_text(recipe.model_dump_json())
    return folder / "teacher"


def _stage(students: Mapping[str, str], steps: int) -> Distill:
    chosen = {name: {"model": model} for name, model in students.items()}
    return Distill.model_validate({**_STAGE, "steps": steps, "students": chosen})


def _artifact(kind: str, path: Path) -> Artifact:
    manifest = Manifest(kind=kind, key="f" * 64, created="", files={}, provenance={}, summary={})
    return Artifact("f" * 64, kind, path, manifest)
