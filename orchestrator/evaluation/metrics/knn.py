"""k nearest neighbours of embeddings: a score that trains nothing. NumPy only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orchestrator.data.large_arrays import taken
from orchestrator.evaluation.metric import LEAVE_ONE_OUT, Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.evaluation.metrics.similarity import Floats, Rows, similarities, unit


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


@dataclass(frozen=True)
class Neighbours:
    """The nearest samples of a bank by cosine similarity, the nearest first.

    Attributes:
        rows_MK: their rows in the bank.
        similarities_MK: their cosine similarities.
    """

    rows_MK: Rows
    similarities_MK: Floats

    def vote(
        self, class_of_N: NDArray[np.integer[Any]], k: int, temperature: float | None = None
    ) -> NDArray[np.int64]:
        """The class that wins the vote of each query's k nearest, (M,).

        Args:
            class_of_N: of each sample of the bank, from 0.
            k: how many vote; all that were looked for if there are fewer.
            temperature: a vote weighs exp(similarity / temperature), as in DINO (arXiv 2104.14294); without one all
                votes weigh the same, and a tie goes to the class with the larger summed similarity.
        """
        similarity = self.similarities_MK[:, :k].astype(np.float64)
        if temperature is None:
            # A vote outweighs any difference of summed similarities, which is at most 2k.
            ballots = 2 * k + 1 + similarity
        else:
            # From the largest down, as exp(1 / 0.001) has no float.
            ballots = np.exp((similarity - similarity[:, :1]) / temperature)
        scores = np.zeros((len(similarity), int(class_of_N.max()) + 1))
        np.add.at(scores, (np.arange(len(similarity))[:, None], class_of_N[self.rows_MK[:, :k]]), ballots)
        winners: NDArray[np.int64] = scores.argmax(axis=1)
        return winners


def nearest(
    bank_ND: NDArray[np.floating], queries_MD: NDArray[np.floating] | None, k: int, *, others: bool = False
) -> Neighbours:
    """The k nearest samples of a bank for each query; of a smaller bank all.

    Args:
        bank_ND, queries_MD: embeddings, L2-normalised here. None asks about the bank's own samples.
        k: how many.
        others: whether query i is of the picture of sample i, which then is none of its neighbours. It is so without
            queries.

    Raises:
        ValueError: no samples, k < 1, or embeddings that are not finite.
    """
    unit_ND = unit(bank_ND)
    asked_MD = unit_ND if queries_MD is None else unit(queries_MD)
    others = others or queries_MD is None
    k = min(k, len(unit_ND) - others)
    if k < 1:
        raise ValueError(f"no neighbours among {len(unit_ND)} samples")
    found, near = [], []
    for rows, similarity_CN in similarities(asked_MD, unit_ND):
        if others:
            similarity_CN[np.arange(len(rows)), rows] = -np.inf
        at_CK = np.argpartition(-similarity_CN, k - 1, axis=1)[:, :k]
        of_CK = np.take_along_axis(similarity_CN, at_CK, axis=1)
        order_CK = np.argsort(-of_CK, axis=1, kind="stable")
        found.append(np.take_along_axis(at_CK, order_CK, axis=1))
        near.append(np.take_along_axis(of_CK, order_CK, axis=1))
    return Neighbours(np.concatenate(found), np.concatenate(near))


class Knn(Metric):
    """The accuracy of a vote of the nearest training pictures. Of several settings validation chooses."""

    needs_labels: ClassVar[bool] = True
    of_pixels: ClassVar[bool] = True

    vote: Literal["majority", "softmax"] = Field(
        "softmax",
        description="How neighbours vote: each with one vote, or with the weight exp(cosine similarity / temperature).",
    )
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10, 20, 50),
        min_length=1,
        description="The numbers of neighbours to choose from. Without a `split`, the first one is used.",
    )
    temperature: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.07,),
        min_length=1,
        description="The temperatures of `softmax` to choose from. Without a `split`, the first one is used.",
    )

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`accuracy`: of the test pictures against the training pictures, or leave-one-out without a split."""
        rows = labelled(features)
        names = sorted({str(features.labels[row]) for part in rows.values() for row in part})
        class_of = {name: at for at, name in enumerate(names)}
        classes = {
            split: np.array([class_of[str(features.labels[row])] for row in part])
            for split, part in rows.items()
        }
        temperatures: Sequence[float | None] = self.temperature if self.vote == "softmax" else (None,)
        if LEAVE_ONE_OUT in rows:
            k, temperature = self.k[0], temperatures[0]
            bank_ND, of_N = taken(features.cls_ND, rows[LEAVE_ONE_OUT]), classes[LEAVE_ONE_OUT]
            hits = nearest(bank_ND, None, k).vote(of_N, k, temperature) == of_N
            return {"accuracy": mean(hits, LEAVE_ONE_OUT, features.seed, _note(k, temperature))}
        bank_ND, of_N = taken(features.cls_ND, rows["train"]), classes["train"]
        near = nearest(bank_ND, taken(features.cls_ND, rows["validation"]), max(self.k))
        chosen, best = (self.k[0], temperatures[0]), -1.0
        for k in self.k:
            for temperature in temperatures:
                right = float((near.vote(of_N, k, temperature) == classes["validation"]).mean())
                if right > best:
                    chosen, best = (k, temperature), right
        near = nearest(bank_ND, taken(features.cls_ND, rows["test"]), chosen[0])
        hits = near.vote(of_N, *chosen) == classes["test"]
        note = f"{_note(*chosen)}, validation {best:.3f}"
        return {"accuracy": mean(hits, "test", features.seed, note)}

    def floor(self, features: Features) -> tuple[str, Mapping[str, float | Figure]]:
        """Always the largest class."""
        return MAJORITY, {"accuracy": majority(features)}


MAJORITY = "majority group"


def majority(features: Features) -> Figure:
    """The accuracy of always giving the largest class of the training pictures."""
    rows = labelled(features)
    learned, asked = next(iter(rows)), list(rows)[-1]
    counts = Counter(str(features.labels[row]) for row in rows[learned])
    largest = min(counts, key=lambda name: (-counts[name], name))
    hits = np.array([features.labels[row] == largest for row in rows[asked]])
    return mean(hits, asked, features.seed, f"always {largest}")


def labelled(features: Features) -> dict[str, Rows]:
    """The rows with labels by split, in the order train, validation, test; without splits one that is leave-one-out."""
    has_N = np.array([bool(label) for label in features.labels], dtype=bool)
    if not features.splits:
        return {LEAVE_ONE_OUT: np.flatnonzero(has_N)}
    return {name: rows[has_N[rows]] for name, rows in features.splits.items()}


def _note(k: int, temperature: float | None) -> str:
    return f"k={k}" + ("" if temperature is None else f", T={temperature:g}")
