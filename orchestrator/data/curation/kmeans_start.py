"""First centres that are spread over the vectors: k-means++ in rounds, on a sample."""

from __future__ import annotations

import math

import numpy as np

from orchestrator.data.curation.vectors import Floats, Vectors
from orchestrator.data.rng import generator

# Vectors of the sample for each centre, as far as memory goes.
_EACH = 16
_LEAST = 4096
_SAMPLE_BYTES = 24 << 20
# So many centres are drawn one at a time, as in k-means++, each a pass over the sample. Later a round adds a share of
# those that there are: 4,000 centres take 25 passes more, and each is a matrix product.
_ALONE = 256
_SHARE = 8
_TILE = 2048


def spread_start(vectors: Vectors, shift_D: Floats, num_centres: int, seed: int) -> Floats:
    """Centres among the vectors, the next ones drawn with probabilities that grow with the squared distance to those
    that are drawn (Arthur and Vassilvitskii 2007).

    As long as one is drawn at a time, the best of a few is taken. Later, several are drawn before distances are
    computed again.

    Args:
        vectors: N of them.
        shift_D: is taken from each.
        num_centres: K, at most N.
        seed: of the draws.

    Returns:
        (K, D), shifted. Where there are fewer different vectors in the sample, some are equal.
    """
    total, dim = vectors.shape
    rng = generator(seed, "start")
    fits = _SAMPLE_BYTES // (4 * dim)
    size = min(total, max(num_centres, min(max(_LEAST, _EACH * num_centres), fits)))
    rows = np.sort(rng.choice(total, size, replace=False)) if size < total else np.arange(total)
    # A copy: it may be shifted in place.
    sample_ND = vectors.take(rows)
    sample_ND -= shift_D
    squares_N = np.einsum("nd,nd->n", sample_ND, sample_ND)
    chosen = [int(rng.integers(size))]
    away_N = _distances(sample_ND, squares_N, chosen)[:, 0]
    away_N[chosen] = 0
    while len(chosen) < num_centres:
        alone = len(chosen) < _ALONE
        count = 1 if alone else min(num_centres - len(chosen), len(chosen) // _SHARE)
        weights_N = away_N.astype(np.float64)
        possible = int(np.count_nonzero(weights_N))
        if possible < count:
            # All that is different is taken; the others are as good as any.
            others = np.setdiff1d(np.arange(size), chosen)
            chosen += rng.permutation(others)[: num_centres - len(chosen)].tolist()
            break
        tries = min(possible, 2 + int(math.log(num_centres)) if alone else count)
        new = rng.choice(size, tries, replace=False, p=weights_N / weights_N.sum()).tolist()
        if alone:
            left_NT = np.minimum(away_N[:, None], _distances(sample_ND, squares_N, new))
            best = int(left_NT.sum(0, dtype=np.float64).argmin())
            away_N, new = left_NT[:, best].copy(), [new[best]]
        else:
            away_N = _nearer(away_N, sample_ND, squares_N, new)
        away_N[new] = 0
        chosen += new
    return sample_ND[chosen]


def _distances(sample_ND: Floats, squares_N: Floats, chosen: list[int]) -> Floats:
    """The squared distance of each vector to each of the chosen ones, (N, len(chosen))."""
    return _between(sample_ND, squares_N, sample_ND[chosen], squares_N[chosen])


def _between(rows_nD: Floats, squares_n: Floats, centres_KD: Floats, squares_K: Floats) -> Floats:
    return np.maximum(squares_n[:, None] + squares_K - 2 * (rows_nD @ centres_KD.T), 0)


def _nearer(away_N: Floats, sample_ND: Floats, squares_N: Floats, chosen: list[int]) -> Floats:
    """The squared distance of each vector to what was nearest, or to the nearest of the chosen ones."""
    found_N = np.empty_like(away_N)
    for start in range(0, len(sample_ND), _TILE):
        part = slice(start, start + _TILE)
        distances_nK = _between(sample_ND[part], squares_N[part], sample_ND[chosen], squares_N[chosen])
        found_N[part] = np.minimum(away_N[part], distances_nK.min(1))
    return found_N
