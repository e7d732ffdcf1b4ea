"""Retrieval between images and texts in one space. NumPy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from orchestrator.evaluation.metrics.similarity import Floats, Rows, similarities, unit


def retrieval_hits(
    image_ND: NDArray[np.floating],
    text_ND: NDArray[np.floating],
    groups: Sequence[str],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, NDArray[np.bool_]]:
    """Which queries find their group among the first k results by cosine similarity, in both directions.

    A query counts if any of its first k results is of its own group, so photos with the same caption are not
    held against each other. Equal similarities rank in the worst order: collapsed embeddings find nothing.

    Args:
        image_ND, text_ND: embeddings of N pairs, row by row; L2-normalised here.
        groups: N names, such as the captions themselves; equal names are interchangeable.
        ks: cut-offs.

    Returns:
        For every k `image_to_text_recall_at_{k}` and `text_to_image_recall_at_{k}`, of each query, (N,). Their mean is
        the recall.

    Raises:
        ValueError: no pairs, lengths that differ, a k < 1, or embeddings that are not finite.
    """
    num_pairs = len(groups)
    if num_pairs == 0 or len(image_ND) != num_pairs or len(text_ND) != num_pairs or min(ks) < 1:
        raise ValueError(
            f"no recall at {ks} of {len(image_ND)} images, {len(text_ND)} texts, {num_pairs} groups"
        )
    unit_image_ND, unit_text_ND = unit(image_ND), unit(text_ND)
    _, group_of_N = np.unique(np.asarray(groups), return_inverse=True)
    to_text_N = _rank_of_first_hit(unit_image_ND, unit_text_ND, group_of_N)
    to_image_N = _rank_of_first_hit(unit_text_ND, unit_image_ND, group_of_N)
    hits: dict[str, NDArray[np.bool_]] = {}
    for k in ks:
        hits[f"image_to_text_recall_at_{k}"] = to_text_N < k
        hits[f"text_to_image_recall_at_{k}"] = to_image_N < k
    return hits


def _rank_of_first_hit(queries_ND: Floats, items_ND: Floats, group_of_N: Rows) -> Rows:
    """How many items of other groups come before (or level with) the best one of the query's group, (N,)."""
    ranks = []
    for rows, similarity_CN in similarities(queries_ND, items_ND):
        is_hit_CN = group_of_N[rows][:, None] == group_of_N
        best_C = np.where(is_hit_CN, similarity_CN, -np.inf).max(axis=1)
        ranks.append((~is_hit_CN & (similarity_CN >= best_C[:, None])).sum(axis=1))
    return np.concatenate(ranks)


def chance(groups: Sequence[str], k: int) -> float:
    """Recall at k of random ranking: the mean over queries of 1 − C(N−m, k)/C(N, k); m of N items are of the group."""
    num_items = len(groups)
    k = min(k, num_items)
    missed = sum(
        size * math.comb(num_items - size, k) / math.comb(num_items, k) for size in Counter(groups).values()
    )
    return 1.0 - missed / num_items
