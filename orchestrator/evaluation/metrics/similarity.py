"""Cosine similarities of embeddings, in pieces that fit into memory. NumPy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.large_arrays import empty, pieces

Floats = NDArray[np.float32]
Rows = NDArray[np.intp]

# Rows compared with everything at a time, and the number of similarities above which there are fewer of them. What a
# metric makes of 4M similarities takes about 100 MiB; below 16 rows a product of matrices would be slow.
_CHUNK, _MOST, _LEAST = 1024, 2**22, 16


def similarities(queries_ND: Floats, items_ND: Floats) -> Iterator[tuple[Rows, Floats]]:
    """Rows of the queries, and their similarities with all items, (C, N); both L2-normalised."""
    step = min(_CHUNK, max(_LEAST, _MOST // max(1, len(items_ND))))
    for start in range(0, len(queries_ND), step):
        rows = np.arange(start, min(start + step, len(queries_ND)))
        yield rows, queries_ND[rows] @ items_ND.T


def unit(features_ND: NDArray[np.floating]) -> Floats:
    """The rows at length 1, float32.

    Raises:
        ValueError: a number is not finite.
    """
    unit_ND: Floats = empty(features_ND.shape, np.float32)
    for piece in pieces(unit_ND):
        # NaN compares false with everything, which would rank it first.
        if not np.isfinite(features_ND[piece]).all():
            raise ValueError("embeddings are not finite")
        rows_nD = features_ND[piece].astype(np.float32)
        unit_ND[piece] = rows_nD / np.maximum(np.linalg.norm(rows_nD, axis=1, keepdims=True), 1e-12)
    return unit_ND
