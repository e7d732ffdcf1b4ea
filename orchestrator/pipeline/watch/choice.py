"""What a checkpoint is worth, by which figure the best is chosen, and which that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from orchestrator.errors import UserError, nearest
from orchestrator.evaluation.metric import Figure, Metric
from orchestrator.stages.metric import OwnMetric

# Figures of which less is better.
_ERRORS = ("rmse", "abs_rel", "relative_error", "cross_entropy", "set_loss")
# What is computed of a backbone if nothing is asked for.
_DEFAULT = ("knn",)


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
        raise no_figure(str(by), names)
    best = max(scores, key=lambda score: (goodness(name, score.figures[name].value), -score.step))
    return Best(best.step, name, best.figures[name])


def goodness(name: str, value: float) -> float:
    """A number that is larger for the better of two values of a figure; a value that is not a number is the worst."""
    sign = -1.0 if name.rpartition("/")[2] in _ERRORS else 1.0
    return sign * value if math.isfinite(value) else -math.inf


def no_figure(by: str, names: Sequence[str]) -> UserError:
    """What to say of a figure that nobody computes."""
    close = nearest(by, names)
    hint = f"did you mean {close!r}?" if close else f"there are: {', '.join(names)}"
    return UserError(f"there is no figure {by!r}", where="--by", hint=hint)


def parsed(names: Sequence[str]) -> list[Metric]:
    """Metrics by their names with their default settings; k-NN if there is no name.

    Raises:
        UserError: there is no such metric, it needs settings, or a split.
    """
    found: list[Metric] = []
    for name in names or _DEFAULT:
        try:
            metric: Metric = TypeAdapter(OwnMetric).validate_python(
                {"use": "knn", "vote": "majority", "k": [5]} if name == "knn" else name
            )
        except ValidationError as error:
            what = error.errors()[0]["msg"].removeprefix("Value error, ")
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
