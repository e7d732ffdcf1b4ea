"""Training-free scores of embeddings: k nearest neighbours and image-text retrieval. NumPy only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Rows = NDArray[np.intp]

# Rows compared with everything at a time: bounds memory at 1024·N similarities.
_CHUNK = 1024


def knn_vote(
    bank_ND: NDArray[np.floating],
    labels: Sequence[str] | NDArray[Any],
    queries_MD: NDArray[np.floating] | None = None,
    k: int = 5,
) -> NDArray[Any]:
    """The label that wins the vote of each query's k nearest samples of a bank.

    Neighbours by cosine similarity, one vote each; a tie goes to the label with the larger summed similarity.

    Args:
        bank_ND: one embedding per sample; L2-normalised here.
        labels: N labels.
        queries_MD: one embedding per query; None asks about each sample of the bank, which then has no vote itself.
        k: number of neighbours; all that may vote if there are fewer.

    Returns:
        M labels.

    Raises:
        ValueError: nobody votes, another number of labels, k < 1, or embeddings that are not finite.
    """
    voters = len(labels) - (queries_MD is None)
    if len(bank_ND) != len(labels) or voters < 1 or k < 1:
        raise ValueError(f"cannot vote with {len(bank_ND)} samples, {len(labels)} labels and k = {k}")
    unit_ND = _unit(bank_ND)
    asked_MD = unit_ND if queries_MD is None else _unit(queries_MD)
    names, label_of_N = np.unique(np.asarray(labels), return_inverse=True)
    k = min(k, voters)
    won = []
    for rows, similarity_CN in _similarities(asked_MD, unit_ND):
        if queries_MD is None:
            similarity_CN[np.arange(len(rows)), rows] = -np.inf
        nearest_Ck = np.argpartition(-similarity_CN, k - 1, axis=1)[:, :k]
        # A vote outweighs any difference of summed similarities, which is at most 2k.
        ballots_Ck = 2 * k + 1 + np.take_along_axis(similarity_CN, nearest_Ck, axis=1).astype(np.float64)
        scores_CL = np.zeros((len(rows), len(names)))
        np.add.at(scores_CL, (np.arange(len(rows))[:, None], label_of_N[nearest_Ck]), ballots_Ck)
        won.append(scores_CL.argmax(axis=1))
    winners: NDArray[Any] = names[np.concatenate(won)]
    return winners


def knn_leave_one_out(features_ND: NDArray[np.floating], labels: Sequence[str], k: int = 5) -> float:
    """Share of samples whose label wins the vote of their k nearest other samples; see :func:`knn_vote`.

    A label with a single sample can only be missed, and counts as missed.

    Returns:
        Accuracy, 0 to 1.

    Raises:
        ValueError: as :func:`knn_vote`.
    """
    return float((knn_vote(features_ND, labels, k=k) == np.asarray(labels)).mean())


def retrieval_recall(
    image_ND: NDArray[np.floating],
    text_ND: NDArray[np.floating],
    groups: Sequence[str],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k of retrieval by cosine similarity, in both directions, with the level of random ranking.

    A query counts if any of its first k results is of its own group, so photos with the same caption are not
    held against each other. Equal similarities rank in the worst order: collapsed embeddings find nothing.

    Args:
        image_ND, text_ND: embeddings of N pairs, row by row; L2-normalised here.
        groups: N names, such as the captions themselves; equal names are interchangeable.
        ks: cut-offs.

    Returns:
        For every k `image_to_text_recall_at_{k}`, `text_to_image_recall_at_{k}` and `chance_recall_at_{k}`,
        the expectation under random ranking (the same in both directions), 0 to 1.

    Raises:
        ValueError: no pairs, lengths that differ, a k < 1, or embeddings that are not finite.
    """
    num_pairs = len(groups)
    if num_pairs == 0 or len(image_ND) != num_pairs or len(text_ND) != num_pairs or min(ks) < 1:
        raise ValueError(
            f"no recall at {ks} of {len(image_ND)} images, {len(text_ND)} texts, {num_pairs} groups"
        )
    unit_image_ND, unit_text_ND = _unit(image_ND), _unit(text_ND)
    _, group_of_N = np.unique(np.asarray(groups), return_inverse=True)
    to_text_N = _rank_of_first_hit(unit_image_ND, unit_text_ND, group_of_N)
    to_image_N = _rank_of_first_hit(unit_text_ND, unit_image_ND, group_of_N)
    scores: dict[str, float] = {}
    for k in ks:
        scores[f"image_to_text_recall_at_{k}"] = float((to_text_N < k).mean())
        scores[f"text_to_image_recall_at_{k}"] = float((to_image_N < k).mean())
        scores[f"chance_recall_at_{k}"] = _chance(groups, k)
    return scores


def _rank_of_first_hit(queries_ND: Floats, items_ND: Floats, group_of_N: Rows) -> Rows:
    """How many items of other groups come before (or level with) the best one of the query's group, (N,)."""
    ranks = []
    for rows, similarity_CN in _similarities(queries_ND, items_ND):
        is_hit_CN = group_of_N[rows][:, None] == group_of_N
        best_C = np.where(is_hit_CN, similarity_CN, -np.inf).max(axis=1)
        ranks.append((~is_hit_CN & (similarity_CN >= best_C[:, None])).sum(axis=1))
    return np.concatenate(ranks)


def _chance(groups: Sequence[str], k: int) -> float:
    """Mean over queries of 1 − C(N−m, k)/C(N, k), where m of N items are of the query's group."""
    num_items = len(groups)
    k = min(k, num_items)
    missed = sum(
        size * math.comb(num_items - size, k) / math.comb(num_items, k) for size in Counter(groups).values()
    )
    return 1.0 - missed / num_items


def _similarities(queries_ND: Floats, items_ND: Floats) -> Iterator[tuple[Rows, Floats]]:
    for start in range(0, len(queries_ND), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(queries_ND)))
        yield rows, queries_ND[rows] @ items_ND.T


def _unit(features_ND: NDArray[np.floating]) -> Floats:
    # NaN compares false with everything, which would rank it first.
    if not np.isfinite(features_ND).all():
        raise ValueError("embeddings are not finite")
    unit_ND: Floats = features_ND.astype(np.float32)
    unit_ND /= np.maximum(np.linalg.norm(unit_ND, axis=1, keepdims=True), 1e-12)
    return unit_ND
