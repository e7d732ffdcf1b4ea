"""What came of each held-out picture, the figure that it makes, and how far another draw of pictures would move it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Asked = NDArray[np.float64]
"""One model asked in one way: of pictures (N,), 1 for right and 0 for wrong; of scenes (N, 2, 2), of foreground and of
background the pixels of intersection and of union."""

_DRAWS = 2000
_LEVEL = 0.95


def value(asked: Asked) -> float:
    """Share of pictures that are right; of scenes the mean IoU of both classes, over the pixels of all scenes."""
    return float(_values(asked, np.ones((1, len(asked))))[0])


def values(asked: Sequence[Asked]) -> list[float]:
    """The figure of each seed."""
    return [value(one) for one in asked]


def over_pictures(ours: Sequence[Asked], theirs: Sequence[Asked], draws: int = _DRAWS) -> tuple[float, float]:
    """95 % of the gain in the mean over seeds, where pictures are drawn anew, with replacement (bootstrap).

    Each draw is the same for both sides and all seeds: all were asked about the same pictures.
    """
    count = len(ours[0])
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws)
    gains = np.mean([_values(one, weights) for one in ours], 0)
    gains -= np.mean([_values(one, weights) for one in theirs], 0)
    low, high = np.quantile(gains, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float] | None:
    """95 % of the mean gain by Student's t, seed by seed, or against what has no seed; None of a single seed."""
    others = list(theirs) if len(theirs) > 1 else list(theirs) * len(ours)
    gains = [one - other for one, other in zip(ours, others, strict=True)]
    if len(gains) < 2:
        return None
    half = float(t.ppf((1 + _LEVEL) / 2, len(gains) - 1)) * stdev(gains) / len(gains) ** 0.5
    return mean(gains) - half, mean(gains) + half


def _values(asked: Asked, weights: NDArray[np.number]) -> NDArray[np.float64]:
    """The figure for each row of weights (draws, N) of the pictures."""
    if asked.ndim == 1:
        return np.asarray(weights @ asked / weights.sum(1), np.float64)
    shared = (weights @ asked.reshape(len(asked), -1)).reshape(-1, 2, 2)
    return np.asarray((shared[..., 0] / np.maximum(1, shared[..., 1])).mean(1), np.float64)
