"""The loop of a watcher: new checkpoints are scored, and the best so far is told, kept and registered."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import disk
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Figure
from orchestrator.fsio import move
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.watch.choice import Best, CheckpointScore, best_of, no_figure, parsed
from orchestrator.pipeline.watch.register import Origin, Registering
from orchestrator.pipeline.watch.training import BackboneScorer, ModelTraining, Training
from orchestrator.tracking.answers import UnreachableError
from orchestrator.tracking.connect import absolute_uri

if TYPE_CHECKING:
    from orchestrator.tracking.run import Run, Tracking

_RECORD = "watch.json"
# How its figures are kept apart from those of training.
_CHANNEL = "watch"
_MOST_SECONDS = 86_400
_ANOTHER_FOLDER = "name another folder for --keep"
# How often a watcher tries to put its model where others put theirs at the same moment.
_MOST_TRIES = 10
_LOOK_AGAIN_S = 0.01
# What moving a folder onto one with something in it raises.
_IS_THERE = (errno.ENOTEMPTY, errno.EEXIST)


@dataclass(frozen=True)
class WatchOptions:
    """What a watcher is asked for.

    Attributes:
        metrics: names of metrics that need no split; none for those of the kind of stage.
        by: METRIC/FIGURE by which the best is chosen; None for that of the kind of stage.
        every_s: seconds between two looks for new checkpoints.
        keep: the folder that the best model so far is written into; None for none. Of several students each has a
            folder of its own below it.
        register: where the best model so far is registered; None for nowhere.
        once: whether to score what is there and to end, also while training goes on.
        batch: images in one forward pass.
    """

    metrics: Sequence[str] = ()
    by: str | None = None
    every_s: float = 10.0
    keep: Path | None = None
    register: Registering | None = None
    once: bool = False
    batch: int = 64


@dataclass
class ModelWatch:
    """One model that is watched.

    Attributes:
        training: where its checkpoints are.
        score: computes figures of a model folder.
        by: the figure that decides; None for the first.
        keep, register: see :class:`WatchOptions`.
        origin: what it comes from.
        run: its own in MLflow.
        say: prints a line.
        scratch: a folder that nobody else uses.
        scores: of its checkpoints, in the order in which they were scored.
    """

    training: ModelTraining
    score: Callable[[Path], Mapping[str, Figure]]
    by: str | None
    keep: Path | None
    register: Registering | None
    origin: Origin
    run: Run
    say: Callable[[str], None]
    scratch: Path
    scores: list[CheckpointScore] = field(default_factory=list)
    _waiting: CheckpointScore | None = None

    def advance(self) -> None:
        """Score the checkpoints that are new; before, register a model for which the registry could not be reached."""
        if self._waiting is not None:
            with contextlib.suppress(UnreachableError):
                self._register(self._waiting)
        for step in self.training.steps({score.step for score in self.scores}):
            shutil.rmtree(self.scratch, ignore_errors=True)
            folder = self.training.folder_of(step, self.scratch)
            if folder is None:
                continue
            score = CheckpointScore(step, dict(self.score(folder)))
            self.scores.append(score)
            self._report(score, folder)

    def _report(self, score: CheckpointScore, folder: Path) -> None:
        best = best_of(self.scores, self.by)
        known = {name: one.value for name, one in score.figures.items()}
        known |= {"best": best.figure.value, "best_step": float(best.step)}
        self.run.metrics(known, score.step, _CHANNEL)
        name = self.training.name
        self.say(f"{name}, step {score.step:,}: {best.name} {score.figures[best.name]}; best so far: {best}")
        # A model whose figure is not a number is the best only where there is no other: nobody is to use it.
        if best.step != score.step or not math.isfinite(best.figure.value):
            return
        if self.keep is not None:
            _keep(folder, score, self.keep)
        if self.register is not None:
            # The checkpoint may be gone when the registry answers again.
            shutil.rmtree(self._unregistered, ignore_errors=True)
            shutil.copytree(folder, self._unregistered)
            try:
                self._register(score)
            except UnreachableError as error:
                self._waiting = score
                self.say(f"{name}: {error.what}; step {score.step:,} is registered once it can be")

    @property
    def _unregistered(self) -> Path:
        """The folder of the best model so far, until it is registered."""
        return self.scratch.parent / "unregistered" / self.training.name

    def _register(self, score: CheckpointScore) -> None:
        assert self.register is not None
        best = best_of(self.scores, self.by)
        what = self.register.put(self.run, self._unregistered, score, best, self.origin, self.scratch)
        self._waiting = None
        shutil.rmtree(self._unregistered, ignore_errors=True)
        self.say(f"{self.training.name}: {what}")

    def conclude(self) -> Best:
        """Say which was the best.

        Raises:
            UserError: there was no checkpoint, or the registry still cannot be reached.
        """
        name = self.training.name
        if not self.scores:
            raise UserError(
                f"stage {name!r} has no checkpoint to score",
                where=str(self.training.storage.folder),
                hint="start the run first, and lower `elastic.checkpoint_every_s` to write checkpoints more often",
            )
        best = best_of(self.scores, self.by)
        self.run.params({"best_step": best.step, "best_by": best.name})
        count = "1 checkpoint" if len(self.scores) == 1 else f"{len(self.scores):,} checkpoints"
        self.say(f"{name}: the best of {count} is {best}")
        if self.keep is not None and math.isfinite(best.figure.value):
            self.say(f"{name}: its model is in {self.keep}")
        if self._waiting is not None:
            self._register(self._waiting)
        return best


def watch(
    loaded: LoadedPipeline, stage: str, options: WatchOptions, say: Callable[[str], None]
) -> dict[str, list[CheckpointScore]]:
    """Score checkpoints until the stage is done.

    Args:
        loaded: the pipeline.
        stage: the name of a stage that trains backbones, or `stage/student`.
        options: what is asked for.
        say: prints a line.

    Returns:
        What was seen of each model, in the order in which it was scored.

    Raises:
        UserError: there is no such stage, what it needs is not done yet, no photo has a label, a metric cannot be
            computed so, or nobody trains the stage.
    """
    _check_options(options)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-watch-")))
        training = Training(loaded, stage, scratch)
        if options.register is not None:
            options.register.check(loaded)
        # Mistakes are told at once, and nothing is imported while the first checkpoint may go again.
        scorer = _scorer(loaded, training, options)
        watches = _watches(loaded, training, options, say, scorer, stack, scratch)
        while True:
            # Before the steps: what was committed before the end is still seen.
            goes_on = training.goes_on()
            for one in watches:
                one.advance()
            if options.once or not goes_on:
                break
            time.sleep(options.every_s)
        _conclude(watches)
    return {one.training.name: one.scores for one in watches}


def _conclude(watches: Sequence[ModelWatch]) -> None:
    """Say of each model which checkpoint was the best.

    Raises:
        UserError: the first of one; the others are told, and registered, all the same.
    """
    errors = []
    for one in watches:
        try:
            one.conclude()
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _scorer(loaded: LoadedPipeline, training: Training, options: WatchOptions) -> BackboneScorer | None:
    """What scores the models of the stage by their features; None where the stage has figures of its own."""
    own = [model.model for model in training.models if model.model.score is not None]
    if own and options.metrics:
        raise UserError(
            f"the checkpoints of {training.name!r} are scored by the figures of its own task",
            where="--metric",
            hint=f"leave it out; --by names one of the figures, such as {own[0].chosen_by}",
        )
    metrics = parsed(options.metrics)
    titles = [str(own[0].chosen_by).partition("/")[0]] if own else [metric.title for metric in metrics]
    if options.by is not None and options.by.partition("/")[0] not in titles:
        raise no_figure(options.by, titles)
    if own:
        return None
    return BackboneScorer(training, metrics, options.batch, str(loaded.path), loaded.spec.seed)


def _watches(
    loaded: LoadedPipeline,
    training: Training,
    options: WatchOptions,
    say: Callable[[str], None],
    scorer: BackboneScorer | None,
    stack: ExitStack,
    scratch: Path,
) -> list[ModelWatch]:
    """One watch a model, with a run of its own in the pipeline's experiment."""
    places = [_places(loaded, training, options, model) for model in training.models]
    tracking = stack.enter_context(_tracking(loaded, scratch / "spool"))
    return [
        ModelWatch(
            model,
            score=model.model.score or partial(_required(scorer), model.name),
            by=options.by or model.model.chosen_by,
            keep=keep,
            register=register,
            origin=Origin(loaded.name, training.name, model.student, model.key),
            run=stack.enter_context(_tracked(tracking, f"watch {model.name}")),
            say=say,
            scratch=scratch / "checkpoint",
        )
        for model, (keep, register) in zip(training.models, places, strict=True)
    ]


def _places(
    loaded: LoadedPipeline, training: Training, options: WatchOptions, model: ModelTraining
) -> tuple[Path | None, Registering | None]:
    """Where a model is kept and registered: each of several students has a place of its own.

    Raises:
        UserError: something else is there.
    """
    keep, register = options.keep, options.register
    if len(training.models) > 1:
        keep = None if keep is None else keep / model.student
        register = None if register is None else register.named(model.student)
    if keep is not None:
        _check_free(keep)
        with disk.making(keep, _ANOTHER_FOLDER):
            pass  # that it can be written is seen before anything is scored
    if register is not None:
        register.check_holder(absolute_uri(loaded.spec.tracking.uri))
    return keep, register


def _required(scorer: BackboneScorer | None) -> BackboneScorer:
    assert scorer is not None, "models without figures of their own are scored by their features"
    return scorer


def _check_options(options: WatchOptions) -> None:
    """Raises UserError if no one can wait so long."""
    if not 0 < options.every_s <= _MOST_SECONDS:
        raise UserError(
            f"the time between two checks cannot be {options.every_s:g} seconds",
            where="--every",
            hint="give more than 0 s and at most a day",
        )


def _keep(model: Path, score: CheckpointScore, target: Path) -> None:
    """Put a model where `embed`, `from` and `orchestrator.load` find it, instead of an earlier one."""
    _check_free(target)
    with disk.making(target, _ANOTHER_FOLDER) as draft:
        shutil.copytree(model, draft / "model")
        record = {
            "step": score.step,
            "figures": {name: asdict(figure) for name, figure in score.figures.items()},
        }
        (draft / "model" / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        _replace(draft / "model", target, draft)


def _replace(model: Path, target: Path, draft: Path) -> None:
    """Give a finished folder the name of an earlier one, which goes into `draft`.

    Another watcher may do the same at the same time: the last one has the name. Whoever is stopped in between puts the
    earlier one back.
    """
    for attempt in range(_MOST_TRIES):
        earlier = draft / f"earlier-{attempt}"
        try:
            with contextlib.suppress(FileNotFoundError):
                move(target, earlier)
            move(model, target)
            return
        except OSError as error:
            if error.errno not in _IS_THERE or attempt == _MOST_TRIES - 1:
                raise
        finally:
            if earlier.exists() and not target.exists():
                _put_back(earlier, target)


def _put_back(earlier: Path, target: Path) -> None:
    """Give an earlier folder its name again, unless another watcher has given it to its own meanwhile."""
    try:
        move(earlier, target)
    except OSError as error:
        if error.errno not in _IS_THERE:
            raise


def _check_free(target: Path) -> None:
    """Raises UserError where something else is than what a watcher wrote."""
    for _ in range(_MOST_TRIES):
        if not target.exists() or (target / _RECORD).is_file():
            return
        # Between the two questions another watcher may have moved its model away: the next moment tells.
        time.sleep(_LOOK_AGAIN_S)
    raise UserError(
        f"{target} exists, and was not written by a watcher", where="--keep", hint="name another folder"
    )


def _tracking(loaded: LoadedPipeline, spool: Path) -> Tracking:
    from orchestrator.tracking.run import Tracking

    settings = loaded.spec.tracking
    return Tracking(settings.uri, settings.experiment or loaded.name, spool)


@contextmanager
def _tracked(tracking: Tracking, name: str) -> Iterator[Run]:
    """A run that says how the watcher ended."""
    run = tracking.run(name)
    try:
        yield run
    except BaseException as error:
        run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    run.finish("FINISHED")
