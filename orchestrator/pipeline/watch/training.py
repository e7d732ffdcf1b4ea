"""What a stage leaves behind while it trains: the checkpoints of its models, and what they are scored on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError, nearest
from orchestrator.evaluation.metric import Figure, Metric, checked
from orchestrator.pipeline.keys.cache_key import piece_parts
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import ResolvedStage, resolve
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import Context, Part
from orchestrator.stages.common.checkpointed import CheckpointedModel
from orchestrator.storage.artifacts import Artifact
from orchestrator.tracking.run import NullRun
from orchestrator.training.checkpoint.format import CheckpointError, CheckpointManifest
from orchestrator.training.checkpoint.storage import CheckpointStorage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.data.index import ImageIndex
    from orchestrator.stages.evaluate.measure import Pool
    from orchestrator.stages.evaluate.towers import Crops

_CHECKPOINTS = "checkpoints"
# Labels that k-NN tells apart.
_GROUPS = 10


@dataclass(frozen=True)
class ModelTraining:
    """One model of a stage, and where its checkpoints and the finished model are.

    Attributes:
        name: that it has in messages: the stage's, or `stage/student`.
        student: of the stage; empty if the stage has one model.
        key: of the stage, or of the student.
        model: how it is read.
        storage: its checkpoints.
        finished: the artifact that has the finished model; None while there is none.
    """

    name: str
    student: str
    key: str
    model: CheckpointedModel
    storage: CheckpointStorage
    finished: Callable[[], Artifact | None]

    def steps(self, seen: set[int]) -> list[int]:
        """Steps that were not seen before, ascending: of checkpoints that are there, and of the finished model."""
        there = self.storage.folder.is_dir() or self.storage.store is not None
        found = set(self.storage.committed()) if there else set()
        done = self.finished()
        if done is not None:
            found = {step for step in found if step < self.model.steps} | {self._finished_step(done)}
        return sorted(found - seen)

    def folder_of(self, step: int, scratch: Path) -> Path | None:
        """The model after a step as a folder, below `scratch` if it has to be made; None if its checkpoint is gone."""
        done = self.finished()
        if done is not None and step == self._finished_step(done):
            return done.path / self.model.place
        try:
            manifest = self.storage.find(step)
            self.model.write(_reader(self.storage, manifest), scratch / "model")
        except (CheckpointError, FileNotFoundError):
            return None  # training keeps a few only
        return scratch / "model"

    def _finished_step(self, done: Artifact) -> int:
        """The last step, or an earlier one that the stage chose."""
        return self.model.steps if self.model.kept_step is None else self.model.kept_step(done.path)


def _reader(
    storage: CheckpointStorage, manifest: CheckpointManifest
) -> Callable[[str], Mapping[str, NDArray[np.generic]]]:
    from orchestrator.training.checkpoint.whole import whole_tensors

    def read(prefix: str) -> Mapping[str, NDArray[np.generic]]:
        average = whole_tensors(storage, manifest, f"ema/{prefix}")
        start = f"master/{prefix}"
        trained = {key.removeprefix(start) for key in manifest.keys if key.startswith(start)}
        # As in an export: what has no average, as in a job without an EMA, is there as it was trained.
        return {**whole_tensors(storage, manifest, start), **average} if trained - average.keys() else average

    return read


class Training:
    """A stage, and its models.

    Args:
        loaded: the pipeline.
        name: of the stage, or `stage/student` for one of its students.
        scratch: a folder that nobody else uses.

    Raises:
        UserError: there is no such stage or student, or its checkpoints have no model to score.
    """

    def __init__(self, loaded: LoadedPipeline, name: str, scratch: Path) -> None:
        resolved: dict[str, ResolvedStage] = {one.name: one for one in resolve(loaded)}
        self.name, _, self._student = name.partition("/")
        if self.name not in resolved:
            close = nearest(self.name, list(resolved))
            hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(resolved)}"
            raise UserError(f"there is no stage {self.name!r}", where=str(loaded.path), hint=hint)
        self._loaded, self._resolved, self._scratch = loaded, resolved, scratch
        self._stage, self._own = loaded.spec.stages[self.name], resolved[self.name]
        self._check()
        self._workspace = Workspace(loaded.spec.store)

    def _check(self) -> None:
        where = self._loaded.where("stages", self.name)
        if not self._stage.watched:
            stages = self._loaded.spec.stages
            others = [name for name, stage in stages.items() if stage.watched]
            raise UserError(
                f"stage {self.name!r} is of kind {self._stage.kind}, whose checkpoints have no backbone to score",
                where=where,
                hint=f"this file has {', '.join(others)}"
                if others
                else "no stage of this file has such checkpoints",
            )
        names = [name for name in self._stage.models() if name]
        if self._student and self._student not in names:
            close = nearest(self._student, names)
            there = f"there are: {', '.join(names)}" if names else f"name the stage alone: {self.name}"
            raise UserError(
                f"stage {self.name!r} has no student {self._student!r}",
                where=where,
                hint=f"did you mean {close!r}?" if close else there,
            )

    def goes_on(self) -> bool:
        """Whether somebody trains one of the models, or will."""
        driver = self._workspace.driver(self._loaded.name)
        if (
            driver is None
            or not driver.alive
            or self._workspace.find(self._own.parts.kind, self._own.key) is not None
        ):
            return False
        return any(model.finished() is None for model in self.models)

    @cached_property
    def models(self) -> Sequence[ModelTraining]:
        """The models that are watched.

        Raises:
            UserError: what the stage needs is not done yet, or cannot work.
        """
        found = self._stage.checkpointed(self.context)
        return [
            self._training_of(name, model) for name, model in found.items() if self._student in ("", name)
        ]

    def _training_of(self, name: str, model: CheckpointedModel) -> ModelTraining:
        kind, key = self._own.parts.kind, self._own.key
        if model.piece is not None:
            kind = model.piece[0]
            key = piece_parts(self._stage, self._own.parts, *model.piece).key
        folder = self._workspace.work(kind, key) / _CHECKPOINTS
        remote = self._workspace.remote_work(kind, key)
        storage = CheckpointStorage(folder)
        if remote is not None:
            storage = CheckpointStorage(folder, remote[0], remote[1] + _CHECKPOINTS)
        title = f"{self.name}/{name}" if name else self.name
        return ModelTraining(title, name, key, model, storage, lambda: self._workspace.intact(kind, key))

    @cached_property
    def context(self) -> Context:
        """What the stage gets when it is to say how its checkpoints are read."""
        spec, resolved = self._loaded.spec, self._own
        return Context(
            name=self.name,
            pipeline=spec.name,
            seed=spec.seed,
            key=resolved.key,
            inputs={role: self._input(need) for role, need in resolved.roles.items()},
            keys={},
            sources=spec.data,
            out=self._scratch / "out",
            work=self._scratch / "work",
            elastic=spec.elastic.overlaid(getattr(self._stage, "elastic", None)),
            run=NullRun(),
            parts=self._part,
            modules=tuple(module for each in spec.stages.values() for module in each.modules()),
            stages={role: spec.stages[need] for role, need in resolved.roles.items()},
            names=resolved.roles,
        )

    def _input(self, name: str) -> Artifact:
        stage = self._resolved[name]
        found = self._workspace.intact(stage.parts.kind, stage.key)
        if found is None:
            raise UserError(
                f"stage {name!r}, which {self.name!r} needs, is not done yet",
                where=str(self._loaded.path),
                hint=f"watch {self.name!r} once it trains",
            )
        return found

    @contextlib.contextmanager
    def _part(self, kind: str, identity: Mapping[str, Any]) -> Iterator[Part]:
        """A piece that the stage has made already: whoever trains holds it, and a watcher makes none."""
        key = piece_parts(self._stage, self._own.parts, kind, identity).key
        found = self._workspace.intact(kind, key)
        if found is None:
            raise UserError(
                f"stage {self.name!r} has not begun to train yet",
                where=str(self._loaded.path),
                hint="start the run first, and watch it once it trains",
            )

        def refuse(folder: Path, figures: Mapping[str, float]) -> Path:
            raise AssertionError("a watcher publishes nothing")

        yield Part(self._workspace.work(kind, key), None, found.path, key, refuse)


class BackboneScorer:
    """Scores backbones by their features of the photos that they are trained on.

    Args:
        training: of the stage.
        metrics: to compute.
        batch: images in one forward pass.
        where: the pipeline file.
        seed: of the pipeline.

    Raises:
        UserError: none of the photos has a label.
    """

    def __init__(
        self, training: Training, metrics: Sequence[Metric], batch: int, where: str, seed: int
    ) -> None:
        self._metrics, self._batch, self._where, self._seed = metrics, batch, where, seed
        self._modules = training.context.modules
        self._pool, self._crops = _photos(training.context, where)

    def __call__(self, name: str, folder: Path) -> dict[str, Figure]:
        """The figures of a model folder by METRIC/FIGURE; `name` is its in error messages."""
        from orchestrator.stages.evaluate.measure import features_of
        from orchestrator.stages.evaluate.towers import embed_crops, load_tower

        tower = load_tower(folder, None, self._where, trusted=self._modules)
        cls_ND = embed_crops(
            tower, self._crops.batches(tower.size, self._batch), len(self._crops.rows), _go_on
        )
        features = features_of(
            name, "backbone", tower, self._crops, cls_ND, self._pool, self._batch, self._seed, _go_on
        )
        return {
            f"{metric.title}/{figure}": value
            for metric in self._metrics
            for figure, value in checked(metric, metric.measure(features)).items()
        }


def _photos(context: Context, where: str) -> tuple[Pool, Crops]:
    """The labelled photos of the most frequent groups, each judged by all others; decoded once."""
    from orchestrator.data.index import ImageIndex
    from orchestrator.stages.evaluate.measure import pool_of
    from orchestrator.stages.evaluate.shown import largest_groups
    from orchestrator.stages.evaluate.towers import Crops

    index: ImageIndex = ImageIndex.load(context.inputs["index"].path, context.roots)
    groups = largest_groups(index.labels, _GROUPS)
    if not groups:
        raise UserError(
            "there are not two labels with two photos each to tell apart",
            where=where,
            hint="give the dataset `captions`, a CSV file with the columns file and label",
        )
    pool = pool_of(index, None, groups, everything=False)
    return pool, Crops(pool.index, pool.rows, _go_on)


def _go_on() -> None:
    """Ctrl-C ends a watcher; nothing else has to."""
