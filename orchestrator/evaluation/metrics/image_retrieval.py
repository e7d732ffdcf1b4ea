"""Retrieval of pictures by pictures: does a picture find others of its label? NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orchestrator.data.large_arrays import taken
from orchestrator.evaluation.metric import LEAVE_ONE_OUT, Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.evaluation.metrics.knn import labelled
from orchestrator.evaluation.metrics.similarity import similarities, unit

Floats = NDArray[np.float64]


class ImageRetrieval(Metric):
    """Recall and mean average precision of finding the training pictures of a test picture's label."""

    needs_labels: ClassVar[bool] = True
    of_pixels: ClassVar[bool] = True

    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10),
        description="The numbers of results among which one of the picture's own label counts as found.",
    )

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`mean_average_precision` and `recall_at_K`: test pictures among training pictures, or leave-one-out."""
        rows = labelled(features)
        labels = np.array([str(label) for label in features.labels])
        split = LEAVE_ONE_OUT if LEAVE_ONE_OUT in rows else "test"
        gallery = rows.get("train", rows.get(LEAVE_ONE_OUT))
        assert gallery is not None, "there are training pictures, or all are"
        asked = None if split == LEAVE_ONE_OUT else taken(features.cls_ND, rows[split])
        precision_M, first_M = retrieve(
            taken(features.cls_ND, gallery), labels[gallery], asked, labels[rows[split]]
        )
        # A label that the gallery has nothing of cannot be found, and is no fault of the features.
        there_M = np.isfinite(precision_M)
        found = {"mean_average_precision": mean(precision_M[there_M], split, features.seed)}
        for k in self.recall_at:
            found[f"recall_at_{k}"] = mean(first_M[there_M] < k, split, features.seed)
        return found


def retrieve(
    bank_ND: NDArray[np.floating],
    labels_N: NDArray[Any],
    queries_MD: NDArray[np.floating] | None,
    labels_M: NDArray[Any],
) -> tuple[Floats, NDArray[np.int64]]:
    """Average precision of each query by cosine similarity, (M,), and the rank from 0 of its first hit.

    Equal similarities rank in the worst order. Where the bank has nothing of a query's label, the precision is nan.

    Args:
        bank_ND, labels_N: what is looked through.
        queries_MD, labels_M: what is looked for; None asks about the bank's own samples, each among the others.
    """
    unit_ND = unit(bank_ND)
    asked_MD = unit_ND if queries_MD is None else unit(queries_MD)
    precisions, firsts = [], []
    for rows, similarity_CN in similarities(asked_MD, unit_ND):
        hit_CN = labels_M[rows][:, None] == labels_N
        if queries_MD is None:
            hit_CN[np.arange(len(rows)), rows] = False
            # Last, so that it stands before no other.
            similarity_CN[np.arange(len(rows)), rows] = -np.inf
        order_CN = np.lexsort((hit_CN, -similarity_CN), axis=1)
        ranked_CN = np.take_along_axis(hit_CN, order_CN, axis=1)
        place_N = np.arange(1, ranked_CN.shape[1] + 1)
        hits_C = ranked_CN.sum(axis=1)
        at_hits_C = (np.cumsum(ranked_CN, axis=1) / place_N * ranked_CN).sum(axis=1)
        precisions.append(np.divide(at_hits_C, hits_C, out=np.full(len(rows), np.nan), where=hits_C > 0))
        firsts.append(ranked_CN.argmax(axis=1))
    return np.concatenate(precisions), np.concatenate(firsts)
