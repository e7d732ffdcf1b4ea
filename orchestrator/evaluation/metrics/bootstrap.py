"""How sure a figure is: its 95 % interval over other draws of as many pictures. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.data.rng import generator
from orchestrator.evaluation.metric import Figure

_RESAMPLES = 1000
_LEVEL = 0.95

Sums = NDArray[np.float64]


def interval(
    parts_NK: NDArray[np.generic],
    statistic: Callable[[Sums], NDArray[np.float64]],
    seed: int,
    resamples: int = _RESAMPLES,
    level: float = _LEVEL,
) -> tuple[float, float]:
    """The percentile bootstrap (Efron 1979) of a figure that is a function of sums over pictures.

    Args:
        parts_NK: what each picture adds, such as its hits and its pixels.
        statistic: the figure of each row of sums, (B, K) → (B,).
        seed: of the draws.
        resamples: how many draws of N pictures, with replacement.
        level: the share of draws between the two ends.

    Returns:
        Low and high end; of one picture both are its figure.

    Raises:
        ValueError: no pictures.
    """
    if len(parts_NK) == 0:
        raise ValueError("no pictures to draw from")
    parts = np.asarray(parts_NK, dtype=np.float64)
    sums = np.stack([counts_N @ parts for counts_N in resampled(len(parts), seed, resamples)])
    return ends(statistic(sums), level)


def resampled(count: int, seed: int, resamples: int = _RESAMPLES) -> Iterator[NDArray[np.int64]]:
    """How often each of `count` pictures is in each draw of as many, with replacement, (N,)."""
    rng = generator(seed, "bootstrap")
    for _ in range(resamples):
        yield np.bincount(rng.integers(count, size=count), minlength=count)


def ends(values: ArrayLike, level: float = _LEVEL) -> tuple[float, float]:
    """The interval that has `level` of the values of a figure, one of each draw; nan values do not count."""
    low, high = np.nanquantile(np.asarray(values, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def figure(
    parts_NK: NDArray[np.generic],
    statistic: Callable[[Sums], NDArray[np.float64]],
    split: str,
    seed: int,
    note: str = "",
) -> Figure:
    """A figure with its interval; arguments as for :func:`interval`."""
    value = float(statistic(np.asarray(parts_NK, dtype=np.float64).sum(axis=0, keepdims=True))[0])
    low, high = interval(parts_NK, statistic, seed)
    return Figure(value, low, high, split, len(parts_NK), note)


def mean(values_N: NDArray[np.generic], split: str, seed: int, note: str = "") -> Figure:
    """The mean over pictures, with its interval."""
    count = len(values_N)
    return figure(np.asarray(values_N)[:, None], lambda sums: sums[:, 0] / count, split, seed, note)


def ratio(sums: Sums) -> NDArray[np.float64]:
    """The first sum by the second, a statistic; nan by nothing."""
    found: NDArray[np.float64] = np.full(len(sums), np.nan)
    np.divide(sums[:, 0], sums[:, 1], out=found, where=sums[:, 1] > 0)
    return found
