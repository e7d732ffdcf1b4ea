"""Scores the checkpoints of a stage while it trains: which is the best so far, on a terminal, in MLflow, in a folder.

The watcher reads what training writes and changes nothing of it, so it may run anywhere that sees the store, and be
stopped at any time.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from orchestrator import disk
from orchestrator.errors import UserError, nearest
from orchestrator.evaluation.metric import Figure, Metric, checked
from orchestrator.fsio import move
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import ResolvedStage, resolve
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.metric import OwnMetric
from orchestrator.training.checkpoint.format import CheckpointError
from orchestrator.training.checkpoint.storage import CheckpointStorage

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.stages.evaluate.measure import Pool
    from orchestrator.stages.evaluate.towers import Crops, Tower
    from orchestrator.tracking.run import Run

# Figures of which less is better.
_ERRORS = ("rmse", "abs_rel")
_RECORD = "watch.json"
_CHECKPOINTS = "checkpoints"
# How its figures are kept apart from those of training.
_CHANNEL = "watch"
_MOST_SECONDS = 86_400


@dataclass(frozen=True)
class CheckpointScore:
    """What one checkpoint is worth.

    Attributes:
        step: steps of the stage that were done.
        figures: by METRIC/FIGURE.
    """

    step: int
    figures: Mapping[str, Figure]


@dataclass(frozen=True)
class WatchOptions:
    """What a watcher is asked for.

    Attributes:
        metrics: names of metrics that need no split.
        by: METRIC/FIGURE by which the best is chosen; None for the first figure.
        every_s: seconds between two looks for new checkpoints.
        keep: the folder that the best model so far is written into; None for none.
        once: whether to score what is there and to end, also while training goes on.
        batch: images in one forward pass.
    """

    metrics: Sequence[str] = ("knn",)
    by: str | None = None
    every_s: float = 10.0
    keep: Path | None = None
    once: bool = False
    batch: int = 64


def watch(
    loaded: LoadedPipeline, stage: str, options: WatchOptions, say: Callable[[str], None]
) -> list[CheckpointScore]:
    """Score checkpoints until the stage is done.

    Args:
        loaded: the pipeline.
        stage: the name of a self-supervised stage.
        options: what is asked for.
        say: prints a line.

    Returns:
        What was seen, by step.

    Raises:
        UserError: there is no such stage, its photos are not curated yet, none has a label, a metric cannot be
            computed so, or nobody trains the stage.
    """
    training = Training(loaded, stage)
    metrics = parsed(options.metrics)
    check_options(options, metrics)
    # Mistakes are told at once, and nothing is imported while the first checkpoint may go again.
    training.photos()
    scores: list[CheckpointScore] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-watch-")))
        run = stack.enter_context(_tracked(loaded, f"watch {stage}", scratch / "spool"))
        while True:
            # Before the steps: what was committed before the end is still seen.
            goes_on = training.goes_on()
            for step in training.steps(after=scores[-1].step if scores else -1):
                found = _looked_at(training, step, metrics, options, scratch)
                if found is None:
                    continue
                score, folder = found
                scores.append(score)
                best = best_of(scores, options.by)
                value = score.figures[best.name]
                known = {name: one.value for name, one in score.figures.items()}
                known |= {"best": best.figure.value, "best_step": float(best.step)}
                run.metrics(known, step, _CHANNEL)
                say(f"{stage}, step {step:,}: {best.name} {value}; best so far: {best}")
                if best.step == step and options.keep is not None:
                    _keep(folder, score, options.keep)
            if options.once or not goes_on:
                break
            time.sleep(options.every_s)
        if not scores:
            raise UserError(
                f"stage {stage!r} has no checkpoint to score",
                where=str(training.folder),
                hint="start the run first, and lower `elastic.checkpoint_every_s` to write checkpoints more often",
            )
        best = best_of(scores, options.by)
        run.params({"best_step": best.step, "best_by": best.name})
        say(f"{stage}: the best of {len(scores)} checkpoints is {best}")
        if options.keep is not None:
            say(f"{stage}: its model is in {options.keep}")
    return scores


@dataclass(frozen=True)
class Best:
    """The best of several checkpoints by one figure; of equal ones the first."""

    step: int
    name: str
    figure: Figure

    def __str__(self) -> str:
        return f"step {self.step:,}, {self.name} {self.figure.value:.3f}"


def best_of(scores: Sequence[CheckpointScore], by: str | None = None) -> Best:
    """The best checkpoint.

    Args:
        scores: at least one.
        by: METRIC/FIGURE, or METRIC for its first figure; None for the first of all.

    Raises:
        UserError: there is no such figure.
    """
    names = list(scores[0].figures)
    name = next((one for one in names if by in (None, one, one.partition("/")[0])), None)
    if name is None:
        raise _no_figure(str(by), names)
    sign = -1.0 if name.rpartition("/")[2] in _ERRORS else 1.0

    def goodness(score: CheckpointScore) -> float:
        value = sign * score.figures[name].value
        return value if math.isfinite(value) else -math.inf

    best = max(scores, key=lambda score: (goodness(score), -score.step))
    return Best(best.step, name, best.figures[name])


def _no_figure(by: str, names: Sequence[str]) -> UserError:
    close = nearest(by, names)
    hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(names)}"
    return UserError(f"there is no figure {by!r}", where="--by", hint=hint)


def parsed(names: Sequence[str]) -> list[Metric]:
    """Metrics by their names with their default settings.

    Raises:
        UserError: there is no such metric, it needs settings, or a split.
    """
    found: list[Metric] = []
    for name in names:
        try:
            metric: Metric = TypeAdapter(OwnMetric).validate_python(
                {"use": "knn", "vote": "majority", "k": [5]} if name == "knn" else name
            )
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise UserError(f"the metric {name!r} cannot be used here: {what}", where="--metric") from None
        if metric.needs_split or metric.needs_head is not None:
            needs = "a split" if metric.needs_split else f"a model that learned {metric.needs_head}"
            raise UserError(
                f"{name} needs {needs}, and a watcher has none",
                where="--metric",
                hint="name knn or image_retrieval, and leave others to a stage of kind evaluate",
            )
        found.append(metric)
    return found


def check_options(options: WatchOptions, metrics: Sequence[Metric]) -> None:
    """What can be known of options before a checkpoint is scored.

    Raises:
        UserError: the best cannot be chosen so, nor be kept there, or no one can wait so long.
    """
    titles = [metric.title for metric in metrics]
    if options.by is not None and options.by.partition("/")[0] not in titles:
        raise _no_figure(options.by, titles)
    if not 0 < options.every_s <= _MOST_SECONDS:
        raise UserError(
            f"{options.every_s:g} seconds are no time between two looks",
            where="--every",
            hint="give at most a day",
        )
    if options.keep is not None:
        _check_free(options.keep)


class Training:
    """What a stage leaves behind while it trains.

    Args:
        loaded: the pipeline.
        name: of a self-supervised stage.

    Raises:
        UserError: as :func:`watch`.
    """

    def __init__(self, loaded: LoadedPipeline, name: str) -> None:
        from orchestrator.stages.ssl.config import SelfSupervised

        resolved: dict[str, ResolvedStage] = {one.name: one for one in resolve(loaded)}
        if name not in resolved:
            close = nearest(name, list(resolved))
            hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(resolved)}"
            raise UserError(f"there is no stage {name!r}", where=str(loaded.path), hint=hint)
        stage = loaded.spec.stages[name]
        if not isinstance(stage, SelfSupervised):
            raise UserError(
                f"stage {name!r} is of kind {resolved[name].parts.kind}, whose checkpoints are not watched",
                where=loaded.where("stages", name),
                hint="name a stage of kind pretrain, gram_anchor or high_res",
            )
        self._loaded, self._name, self._stage = loaded, name, stage
        self._resolved = resolved
        self._workspace = Workspace(loaded.spec.store)
        kind, key = resolved[name].parts.kind, resolved[name].key
        self._place = kind, key
        self._photos: Crops | None = None
        self.folder = self._workspace.work(kind, key) / _CHECKPOINTS
        remote = self._workspace.remote_work(kind, key)
        self._storage = CheckpointStorage(self.folder)
        if remote is not None:
            self._storage = CheckpointStorage(self.folder, remote[0], remote[1] + _CHECKPOINTS)

    def goes_on(self) -> bool:
        """Whether somebody trains it, or will."""
        driver = self._workspace.driver(self._loaded.name)
        return driver is not None and driver.alive and self._workspace.find(*self._place) is None

    def steps(self, after: int) -> Iterator[int]:
        """Checkpoints that are there, and the finished stage, in the order of their steps."""
        there = self.folder.is_dir() or self._storage.store is not None
        found = {step for step in self._storage.committed() if step > after} if there else set()
        if self._workspace.find(*self._place) is not None:
            found = {step for step in found if step < self._stage.steps}
            found |= {self._stage.steps} if self._stage.steps > after else set()
        yield from sorted(found)

    def model(self, step: int, folder: Path) -> Path | None:
        """The backbone after a step as a model folder below `folder`; None if its checkpoint is gone."""
        done = self._workspace.find(*self._place)
        if done is not None and step == self._stage.steps:
            return done.path / "model"
        try:
            manifest = self._storage.find(step)
            self._write(manifest, folder / "model")
        except (CheckpointError, FileNotFoundError):
            return None  # training keeps a few only
        return folder / "model"

    @cached_property
    def index(self) -> ImageIndex:
        """The photos that it trains on."""
        from orchestrator.data.index import ImageIndex

        return ImageIndex.load(self._input("index"), self._roots())

    def photos(self) -> Crops:
        """The photos of the pool, decoded once."""
        if self._photos is None:
            from orchestrator.stages.evaluate.towers import Crops

            self._photos = Crops(self.pool.index, self.pool.rows, _go_on)
        return self._photos

    @cached_property
    def pool(self) -> Pool:
        """The labelled photos of the most frequent groups, each judged by all others."""
        from orchestrator.stages.evaluate.measure import pool_of
        from orchestrator.stages.evaluate.shown import largest_groups

        groups = largest_groups(self.index.labels, 10)
        if not groups:
            raise UserError(
                "there are not two labels with two photos each to tell apart",
                where=str(self._loaded.path),
                hint="give the dataset `captions`, a CSV file with the columns file and label",
            )
        return pool_of(self.index, None, groups, everything=False)

    @property
    def seed(self) -> int:
        """Of the pipeline."""
        return self._loaded.spec.seed

    def load(self, folder: Path) -> Tower:
        """A model folder on the device of this process."""
        from orchestrator.stages.evaluate.towers import load_tower

        return load_tower(folder, None, str(self._loaded.path))

    def _write(self, manifest: Any, folder: Path) -> None:
        import torch

        from orchestrator.models import build, save_pretrained
        from orchestrator.training.checkpoint.whole import whole_tensors

        where = self._loaded.where("stages", self._name) or str(self._loaded.path)
        recipe = self._stage.recipe_of(self._inputs(), where)
        shapes = build(recipe.model, **recipe.model_overrides).state_dict()
        flat = whole_tensors(self._storage, manifest, "ema/backbone.")
        flat = flat or whole_tensors(self._storage, manifest, "master/backbone.")
        state = {name: torch.from_numpy(flat[name]).view(tensor.shape) for name, tensor in shapes.items()}
        told = None if recipe.pixels is None else recipe.pixels.model_dump(mode="json")
        size = self._stage.crops_at(0, 0).global_size
        save_pretrained(folder, state, recipe.model, {"image_size": size}, recipe.model_overrides, told)

    def _inputs(self) -> dict[str, Path]:
        return {role: self._input(role) for role in self._resolved[self._name].roles}

    def _input(self, role: str) -> Path:
        name = self._resolved[self._name].roles[role]
        stage = self._resolved[name]
        found = self._workspace.find(stage.parts.kind, stage.key)
        if found is None:
            raise UserError(
                f"stage {name!r}, which {self._name!r} needs, is not done yet",
                where=str(self._loaded.path),
                hint=f"watch {self._name!r} once it trains",
            )
        return found.path

    def _roots(self) -> dict[str, str]:
        return {name: str(source.root) for name, source in self._loaded.spec.data.items()}


def _looked_at(
    training: Training, step: int, metrics: Sequence[Metric], options: WatchOptions, scratch: Path
) -> tuple[CheckpointScore, Path] | None:
    """The figures of a checkpoint, and its model folder; None if it is gone meanwhile."""
    from orchestrator.stages.evaluate.measure import features_of
    from orchestrator.stages.evaluate.towers import embed_crops

    folder = training.model(step, scratch / f"step-{step}")
    for other in scratch.glob("step-*"):
        if other.name != f"step-{step}":
            shutil.rmtree(other, ignore_errors=True)
    if folder is None:
        return None
    pool, tower, crops = training.pool, training.load(folder), training.photos()
    cls_ND = embed_crops(tower, crops.batches(tower.size, options.batch), _go_on)
    features = features_of(
        f"step {step}", "backbone", tower, crops, cls_ND, pool, options.batch, training.seed, _go_on
    )
    figures = {
        f"{metric.title}/{name}": figure
        for metric in metrics
        for name, figure in checked(metric, metric.measure(features)).items()
    }
    return CheckpointScore(step, figures), folder


def _keep(model: Path, score: CheckpointScore, target: Path) -> None:
    """Put a model where `embed`, `from` and `orchestrator.load` find it, instead of an earlier one."""
    _check_free(target)
    with disk.making(target, "name another folder for --keep") as draft:
        shutil.copytree(model, draft / "model")
        record = {
            "step": score.step,
            "figures": {name: asdict(figure) for name, figure in score.figures.items()},
        }
        (draft / "model" / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if target.exists():
            move(target, draft / "earlier")
        move(draft / "model", target)


def _check_free(target: Path) -> None:
    """Raises UserError where something else is than what a watcher wrote."""
    if target.exists() and not (target / _RECORD).is_file():
        raise UserError(
            f"{target} is there, and no watcher wrote it", where="--keep", hint="name another folder"
        )


@contextmanager
def _tracked(loaded: LoadedPipeline, name: str, spool: Path) -> Iterator[Run]:
    """A run of its own in the pipeline's experiment."""
    from orchestrator.tracking.run import Tracking

    settings = loaded.spec.tracking
    with Tracking(settings.uri, settings.experiment or loaded.name, spool) as tracking:
        run = tracking.run(name)
        try:
            yield run
        except BaseException:
            run.finish("FAILED")
            raise
        run.finish("FINISHED")


def _go_on() -> None:
    """Ctrl-C ends a watcher; nothing else has to."""
