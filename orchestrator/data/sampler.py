"""Which samples a step trains on: a pure function of (seed, step), with nothing to save and nothing to skip.

Orders are keyed permutations of row numbers (a Feistel network, Luby and Rackoff 1988, with cycle walking,
Black and Rogaway 2002), so the sample at any position of any epoch is found in O(1).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor, inf, lcm

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.rng import derive
from orchestrator.errors import UserError, nearest

_ROUNDS = 6
_MAX_CYCLE = 10**6
_U64 = np.uint64
_GOLDEN = _U64(0x9E3779B97F4A7C15)


def permute(positions: NDArray[np.int64], n: int, key: int | NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a keyed random permutation of range(n) sends each position.

    Args:
        positions: any shape, values in [0, n).
        n: size of the permuted range, 1 ≤ n < 2^62.
        key: 64 bits; another key is another permutation. An array like `positions` gives each its own.

    Returns:
        int64 of the shape of `positions`; under one key a bijection of range(n). Expected work is under two
        passes a position.
    """
    values = np.asarray(positions).astype(_U64)
    assert int(values.max(initial=0)) < n, f"positions must lie in range({n})"
    num_bits = max(1, (n - 1).bit_length())
    round_keys = [np.broadcast_to(np.asarray(key, dtype=_U64), values.shape).reshape(-1)]
    for _ in range(_ROUNDS):
        round_keys.append(_mix(round_keys[-1] + _GOLDEN))
    keys = np.stack(round_keys[1:])
    result = _feistel(values.reshape(-1), num_bits, keys)
    # The network permutes the next power of two; walking on from values outside range(n) stays a bijection.
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _feistel(result[outside], num_bits, keys[:, outside])
    return result.astype(np.int64).reshape(values.shape)


def _feistel(values: NDArray[np.uint64], num_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Halves of unequal width swap their widths every round; an even number of rounds restores them."""
    left_bits, right_bits = num_bits // 2, num_bits - num_bits // 2
    left, right = values >> _U64(right_bits), values & _U64((1 << right_bits) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & _U64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return (left << _U64(right_bits)) | right


def _numbered(key: int, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A key for each of `numbers` (epochs, cycles) under one key."""
    return _mix(_mix(numbers.astype(_U64) + _GOLDEN) ^ _U64(key))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014); wraps modulo 2^64."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


class SampleOrder:
    """Sample ids of every step, from one or more parts of an index.

    A share of the batches is homogeneous (all samples from one source), the others mix the parts (DINOv3,
    arXiv 2508.10104, section 3.1: 10 % homogeneous). Every pass over a part is a fresh permutation of it, and no
    row of it comes twice before every row came once (in draw order; the mix shuffles draws within one cycle of
    slots).

    Args:
        parts: row ids that mixed batches are drawn from, by name. With weights, a row of two parts is drawn for
            both.
        weights: shares of the mixed batches by part, exact over a cycle of slots. None: all parts are one, and
            each of its rows comes once an epoch, also one that is in two parts.
        homogeneous: row ids that homogeneous batches are drawn from, and the share of the batches that are
            homogeneous, exact in every run of steps up to rounding. None: there are none.
        batch_size: samples a step.
        seed: another seed is another order.
        row_weights: of every row of the index, finite and not negative: how often it is drawn beside others of its
            part. Rows of weight 0 are not drawn. None: all alike.

    Raises:
        UserError: no rows to draw, a share that is none, or weights that leave nothing to draw from.
    """

    def __init__(
        self,
        parts: Mapping[str, NDArray[np.int64]],
        weights: Mapping[str, float] | None = None,
        homogeneous: tuple[NDArray[np.int64], float] | None = None,
        *,
        batch_size: int,
        seed: int,
        row_weights: NDArray[np.float64] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        if row_weights is not None:
            parts = {name: _with_weight(name, rows, row_weights) for name, rows in parts.items()}
        if row_weights is not None and homogeneous is not None:
            homogeneous = _with_weight("homogeneous", homogeneous[0], row_weights), homogeneous[1]
        rows, share = homogeneous if homogeneous is not None else (np.empty(0, np.int64), 0.0)
        _check(parts, weights, homogeneous, batch_size)
        ratio = Fraction(share).limit_denominator(10**6)
        self._num, self._den = ratio.numerator, ratio.denominator
        self._phase = derive("phase", seed) % self._den
        self._homogeneous = np.asarray(rows, dtype=np.int64)
        self._parts = _parts(parts, weights)
        self._slots = _slots([1.0 if weights is None else weights[name] for name in self._parts])
        self._ends = np.cumsum(self._slots)
        self._shares = {name: _shares(rows, row_weights) for name, rows in self._parts.items()}
        self._homogeneous_shares = _shares(self._homogeneous, row_weights)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Every row that some step draws, ascending."""
        mixed = self._parts.values() if self._num < self._den else ()
        return np.unique(np.concatenate([*mixed, *([self._homogeneous] if self._num else [])]))

    def is_homogeneous(self, step: int) -> bool:
        """Whether all samples of `step` come from the homogeneous source."""
        return self._num_homogeneous(step + 1) > self._num_homogeneous(step)

    def ids(self, step: int) -> NDArray[np.int64]:
        """The row ids of `step`, (batch_size,) int64; O(batch_size) whatever the step."""
        before = self._num_homogeneous(step)
        places = np.arange(self.batch_size, dtype=np.int64)
        if self.is_homogeneous(step):
            key = derive("epoch", self.seed, "homogeneous")
            draws = before * self.batch_size + places
            return _draw(self._homogeneous, self._homogeneous_shares, key, draws)
        return self._mix((step - before) * self.batch_size + places)

    def drawn_from(self, step: int, row: int) -> NDArray[np.int64]:
        """The rows among which `step` drew `row`."""
        if self.is_homogeneous(step):
            return self._homogeneous
        return next(rows for rows in self._parts.values() if np.any(rows == row))

    def _num_homogeneous(self, step: int) -> int:
        """Homogeneous steps before `step`: integers only, so that no rounding drifts over a long run."""
        return (step * self._num + self._phase) // self._den - self._phase // self._den

    def _mix(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots come in cycles; every cycle holds each part's exact number of slots in a keyed order."""
        length = int(self._ends[-1])
        cycles, places = slots // length, slots % length
        places = permute(places, length, _numbered(derive("mix", self.seed), cycles))
        which = np.searchsorted(self._ends, places, side="right")
        ids = np.empty_like(slots)
        for number, (name, rows) in enumerate(self._parts.items()):
            chosen = which == number
            quota = self._slots[number]
            nth_of_cycle = places[chosen] - (self._ends[number] - quota)
            key = derive("epoch", self.seed, "mixed", name)
            ids[chosen] = _draw(rows, self._shares[name], key, cycles[chosen] * quota + nth_of_cycle)
        return ids


def _draw(
    rows: NDArray[np.int64], ends: NDArray[np.float64] | None, key: int, draws: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows by draw number; draw number ÷ size is the epoch.

    With shares, an epoch is a systematic sample: equally spaced points in [0, 1), each in the share of one row, in a
    keyed order. So a row comes as often as its share of the epoch, rounded up or down. Where the points begin moves by
    the golden ratio from epoch to epoch, so that what is rounded up and what is rounded down even out.
    """
    size = len(rows)
    epochs, positions = draws // size, draws % size
    places = permute(positions, size, _numbered(key, epochs))
    if ends is None:
        return rows[places]
    begin = (_mix(np.asarray([key], dtype=_U64)) + epochs.astype(_U64) * _GOLDEN) >> _U64(11)
    points = (places + begin * 2.0**-53) / size
    drawn: NDArray[np.int64] = rows[np.searchsorted(ends, points, side="right").clip(max=size - 1)]
    return drawn


def _shares(rows: NDArray[np.int64], weights: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """Where the share of each row ends in [0, 1]; None where all are alike."""
    if weights is None or not len(rows) or np.all(weights[rows] == weights[rows[0]]):
        return None
    # As parts of the largest, which cannot overflow.
    ends = np.cumsum(weights[rows] / weights[rows].max())
    return np.asarray(ends / ends[-1])


def _with_weight(name: str, rows: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rows that are drawn at all.

    Raises:
        UserError: there are rows, and none is.
    """
    drawn = rows[weights[rows] > 0]
    if len(rows) and not len(drawn):
        raise UserError(
            f"all photos of {name!r} have a weight of 0",
            hint="give those that are to be drawn a positive `weight`",
        )
    return drawn


def _parts(
    parts: Mapping[str, NDArray[np.int64]], weights: Mapping[str, float] | None
) -> dict[str, NDArray[np.int64]]:
    """What slots are for: each part with a weight, or all rows together, under the names of all."""
    if weights is None:
        rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in parts.values()])
        return {"+".join(sorted(parts)): np.unique(rows)}
    return {name: np.asarray(parts[name], dtype=np.int64) for name in sorted(weights) if weights[name] > 0}


def _check(
    parts: Mapping[str, NDArray[np.int64]],
    weights: Mapping[str, float] | None,
    homogeneous: tuple[NDArray[np.int64], float] | None,
    batch_size: int,
) -> None:
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} samples is too small", hint="use at least 1")
    if homogeneous is not None and not 0 <= homogeneous[1] <= 1:
        raise UserError(f"homogeneous_ratio is {homogeneous[1]}", hint="use a share from 0 to 1")
    if not any(len(rows) for rows in parts.values()):
        raise UserError("there are no photos to train on: the mix is empty")
    if homogeneous is not None and not len(homogeneous[0]):
        raise UserError("there are no photos for homogeneous batches", hint="leave out `homogeneous`")
    if weights is None:
        return
    for name, weight in weights.items():
        if not len(parts.get(name, ())):
            close = nearest(name, parts) or " or ".join(sorted(parts))
            raise UserError(f"there are no photos of {name!r} to mix in", hint=f"use {close!r}")
        if not 0 <= weight < inf:
            raise UserError(f"the weight of {name!r} is {weight}", hint="give a positive weight")
    if not any(weights.values()):
        raise UserError(
            f"the weights {dict(weights)} leave nothing to draw from", hint="give positive weights"
        )


def _slots(shares: list[float]) -> NDArray[np.int64]:
    """Whole numbers in the ratio of `shares`: the shortest exact cycle, else the nearest of a million slots."""
    # Only the ratio matters. Below one in a million `limit_denominator` would round it away.
    unit = Fraction(max(shares)) if min(shares) < 1e-6 else Fraction(1)
    parts = [(Fraction(share) / unit).limit_denominator(10**6) or Fraction(share) / unit for share in shares]
    exact = [part / sum(parts) for part in parts]
    length = min(_MAX_CYCLE, lcm(*(share.denominator for share in exact)))
    counts = [floor(share * length) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i] * length, i))
    for i in by_remainder[: length - sum(counts)]:
        counts[i] += 1
    # Rounding must not silence a part that was given a weight.
    pairs = zip(counts, exact, strict=True)
    return np.array([max(count, 1) if share > 0 else 0 for count, share in pairs], dtype=np.int64)
