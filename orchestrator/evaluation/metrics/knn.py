"""k nearest neighbours of embeddings: a score that trains nothing. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.evaluation.metrics.similarity import similarities, unit


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
    unit_ND = unit(bank_ND)
    asked_MD = unit_ND if queries_MD is None else unit(queries_MD)
    names, label_of_N = np.unique(np.asarray(labels), return_inverse=True)
    k = min(k, voters)
    won = []
    for rows, similarity_CN in similarities(asked_MD, unit_ND):
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
