"""What a model must reach before it is given the alias: `knn >= champion`, `miou >= 0.4`, `beats: raw_pixels`."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from orchestrator.errors import nearest, shortened
from orchestrator.stages.common.scores import BASELINES, KNN, Scores
from orchestrator.tracking.aliases import AliasedVersion, Judged

CHAMPION = "champion"
_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"(?P<metric>[^<>=]{1,200}?)\s*(?P<operator>>=|<=|>|<)\s*(?P<against>[^<>=]{1,100})")
# On the version: the metrics of its model, in JSON. What is compared later is what was recorded then.
METRICS_TAG = "metrics"
# Of versions from before there was such a tag.
_OLD_KNN_TAG, _OLD_DIGITS = "orchestrator.knn_accuracy", 4


@dataclass(frozen=True)
class Condition:
    """A comparison of one metric of a model with a number, a baseline, or the version that has the alias."""

    metric: str
    operator: str
    against: float | str

    def __str__(self) -> str:
        against = f"{self.against:.12g}" if isinstance(self.against, float) else self.against
        return f"{self.metric} {self.operator} {against}"


def parse(text: str) -> Condition:
    """The condition that a text is.

    Raises:
        ValueError: it is none.
    """
    found = _CONDITION.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{shortened(text, 80)!r} is not a condition: write METRIC >= NUMBER, METRIC >= {CHAMPION}, or "
            f"beats: {BASELINES[0]}; there are {', '.join(_OPERATORS)}"
        )
    metric, against = found["metric"].strip(), found["against"].strip()
    return Condition(metric, found["operator"], _against(against))


def _against(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        if not math.isfinite(number):
            raise ValueError(f"{text} is not a number that a metric can be compared with")
        return number
    known = (CHAMPION, *BASELINES)
    if text not in known:
        close = nearest(text, known)
        raise ValueError(
            f"{shortened(text, 80)!r} is not a number and nothing that a metric can be compared with: "
            + (f"did you mean {close}?" if close else f"there are {', '.join(known)}")
        )
    return text


def _canonical(value: Any) -> str:
    """A condition in the one spelling that it has in keys, from a text or from `{beats: BASELINE}`."""
    if isinstance(value, Mapping) and set(value) == {"beats"} and isinstance(value["beats"], str):
        value = f"{KNN} > {value['beats']}"
    if not isinstance(value, str):
        raise ValueError(
            f"{shortened(repr(value), 80)} is not a condition: write a text such as `{KNN} >= 0.4`, or "
            f"`beats: {BASELINES[0]}`"
        )
    return str(parse(value))


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, (str, Mapping)) else value


ConditionText = Annotated[str, BeforeValidator(_canonical, json_schema_input_type=str | dict[str, str])]
Conditions = Annotated[
    tuple[ConditionText, ...],
    BeforeValidator(
        _one_or_many, json_schema_input_type=str | dict[str, str] | tuple[str | dict[str, str], ...]
    ),
]


def judge(condition: Condition, scores: Scores | None, version: int, holder: AliasedVersion | None) -> Judged:
    """Whether a condition holds for a model.

    Args:
        condition: what it must reach.
        scores: what the evaluation found of it; None if it did not look at it.
        version: its number in the registry.
        holder: the version that has the alias now.
    """

    def judged(passed: bool, why: str) -> Judged:
        return Judged(str(condition), passed, why)

    value = scores.metrics.get(condition.metric) if scores is not None else None
    if scores is None or value is None:
        return judged(False, _no_figure(condition.metric, scores))
    said = f"{condition.metric} is {value:.5g}"
    if condition.against == CHAMPION:
        if holder is None:
            return judged(True, f"{said}, and no version has the alias yet")
        if holder.version == version:
            return judged(True, f"{said}, and the version has the alias already")
        before = recorded(holder, condition.metric)
        if before is None:
            what = f"{condition.metric} of version {holder.version}, which has the alias, is not on record"
            return judged(False, f"{said}, and {what}")
        against, digits = before
        value = value if digits is None else round(value, digits)
        said += f", of version {holder.version} {against:.5g}"
    elif isinstance(condition.against, str):
        found = scores.baselines.get(condition.against, {}).get(condition.metric)
        if found is None:
            return judged(False, f"{said}, and the evaluation has none of {condition.against}")
        against = found
        said += f", of {condition.against} {against:.5g}"
    else:
        against = condition.against
    return judged(_OPERATORS[condition.operator](value, against), said)


def recorded(holder: AliasedVersion, metric: str) -> tuple[float, int | None] | None:
    """A metric as it is on record for a version, and the digits it was rounded to, if it was; None without a record."""
    try:
        metrics = json.loads(holder.marks.get(METRICS_TAG, "{}"))
        if metric in metrics:
            return float(metrics[metric]), None
        if metric == KNN and _OLD_KNN_TAG in holder.tags:
            return float(holder.tags[_OLD_KNN_TAG]), _OLD_DIGITS
    except (ValueError, TypeError):  # tags that somebody edited
        return None
    return None


def _no_figure(metric: str, scores: Scores | None) -> str:
    if scores is None:
        return "the evaluation has no figures of this model"
    known = sorted(scores.metrics)
    close = nearest(metric, known)
    also = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
    return f"the evaluation has no {metric} of this model; {also}"
