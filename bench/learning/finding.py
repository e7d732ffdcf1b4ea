"""What an experiment found: a value per seed for every arm, and which of its claims hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True)
class Question:
    """One claim and its answer.

    Attributes:
        claim: one line.
        holds: whether it did.
        detail: the figures that say so.
    """

    claim: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Finding:
    """One experiment.

    Attributes:
        name: of the experiment.
        arms: for each arm a value per seed.
        questions: its claims.
        curves: for each curve its points, a value per seed at each.
        settings: what was run, as plain JSON.
        notes: what a reader must know.
    """

    name: str
    arms: Mapping[str, Sequence[float]]
    questions: Sequence[Question]
    curves: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """All of it, with mean and spread of each arm."""
        arms = {
            arm: {"mean": mean(values), "spread": spread(values), "values": list(values)}
            for arm, values in self.arms.items()
        }
        return {**asdict(self), "arms": arms}


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def shown(values: Sequence[float]) -> str:
    """Mean ± spread."""
    return f"{mean(values):.3f} ± {spread(values):.3f}"


def beats(claim: str, ours: Sequence[float], theirs: Sequence[float]) -> Question:
    """Whether `ours` is above `theirs` with every seed, pair by pair: a rule that was set before the first run."""
    gains = [one - other for one, other in zip(ours, theirs, strict=True)]
    return Question(
        claim, min(gains) > 0, f"{shown(ours)} against {shown(theirs)}; least gain {min(gains):+.3f}"
    )
