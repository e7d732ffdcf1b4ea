"""Cosine similarities of embeddings, in pieces that fit into memory. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = NDArray[np.intp]

# Rows compared with everything at a time: bounds memory at 1024·N similarities.
_CHUNK = 1024


def similarities(queries_ND: Floats, items_ND: Floats) -> Iterator[tuple[Rows, Floats]]:
    """Rows of the queries, and their similarities with all items, (C, N); both L2-normalised."""
    for start in range(0, len(queries_ND), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(queries_ND)))
        yield rows, queries_ND[rows] @ items_ND.T


def unit(features_ND: NDArray[np.floating]) -> Floats:
    """The rows at length 1, float32.

    Raises:
        ValueError: a number is not finite.
    """
    # NaN compares false with everything, which would rank it first.
    if not np.isfinite(features_ND).all():
        raise ValueError("embeddings are not finite")
    unit_ND: Floats = features_ND.astype(np.float32)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-12)
    return unit_ND
