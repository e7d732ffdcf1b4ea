"""A linear classifier on frozen features: multinomial logistic regression, by scikit-learn's L-BFGS."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from orchestrator.data.large_arrays import empty, pieces, taken
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.evaluation.metrics.knn import MAJORITY, labelled, majority

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Floats = NDArray[np.float32]

Decay = Annotated[float, Field(gt=0)]
DECAYS: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TOP = 5


class LinearProbe(Metric):
    """The accuracy of a linear classifier of the training pictures' features; validation chooses its weight decay."""

    needs_labels: ClassVar[bool] = True
    needs_split: ClassVar[bool] = True
    of_pixels: ClassVar[bool] = True

    decay: tuple[Decay, ...] = Field(
        DECAYS,
        min_length=1,
        description="The weight decays to choose from. The penalty is half of a decay times the squared norm of the "
        "weights, added to the mean loss over pictures.",
    )
    max_iterations: int = Field(
        500, ge=1, description="The maximum number of L-BFGS iterations for each decay."
    )

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`accuracy` of the test pictures, and `top_5` where there are more than five classes."""
        rows = labelled(features)
        labels = {
            split: np.array([str(features.labels[row]) for row in part]) for split, part in rows.items()
        }
        parts = {split: taken(features.cls_ND, part) for split, part in rows.items()}
        scale = Scale.of(parts["train"])
        # Each part goes once it is scaled: of many pictures it takes gigabytes on disk.
        x = {split: scale(parts.pop(split)) for split in rows}
        chosen, best, decay_of = None, -1.0, 0.0
        for probe, decay in path(x["train"], labels["train"], self.decay, self.max_iterations):
            features.check()
            right = float((probe.predict(x["validation"]) == labels["validation"]).mean())
            if right > best:
                chosen, best, decay_of = probe, right, decay
        assert chosen is not None, "decays have at least one element"
        logits_MC = np.atleast_2d(scores(chosen, x["test"]))
        rank_M = ranks(logits_MC, chosen.classes_, labels["test"])
        note = f"decay={decay_of:g}, validation {best:.3f}"
        found = {"accuracy": mean(rank_M < 1, "test", features.seed, note)}
        if len(chosen.classes_) > _TOP:
            found[f"top_{_TOP}"] = mean(rank_M < _TOP, "test", features.seed, note)
        return found

    def floor(self, features: Features) -> tuple[str, Mapping[str, float | Figure]]:
        """Always the largest class."""
        return MAJORITY, {"accuracy": majority(features)}


@dataclass(frozen=True)
class Scale:
    """Takes features to mean 0 and deviation 1 over those that are trained on: so one decay fits every model."""

    mean_D: NDArray[np.float64]
    std_D: NDArray[np.float64]

    @classmethod
    def of(cls, x_ND: Floats) -> Scale:
        """The scale of training features."""
        mean_D = x_ND.mean(axis=0, dtype=np.float64)
        # As `x_ND.std`, which would have all differences in memory at once.
        squares_D = np.zeros_like(mean_D)
        for piece in pieces(x_ND):
            squares_nD = np.square(x_ND[piece] - mean_D)
            squares_nD[0] += squares_D
            squares_D = squares_nD.sum(axis=0)
        std_D = np.sqrt(squares_D / len(x_ND))
        # A channel that never changes says nothing; its rounding errors must not grow.
        least_D = 1e-6 * np.maximum(np.abs(mean_D), max(float(std_D.max()), 1e-12))
        return cls(mean_D, np.where(std_D > least_D, std_D, np.inf))

    def __call__(self, x_ND: Floats) -> Floats:
        """Features at this scale."""
        scaled_ND: Floats = empty(x_ND.shape, np.float32)
        for piece in pieces(x_ND):
            scaled_ND[piece] = (x_ND[piece] - self.mean_D) / self.std_D
        return scaled_ND


def path(
    x_ND: NDArray[np.float32],
    labels_N: NDArray[Any],
    decays: tuple[float, ...],
    max_iterations: int,
    weights_N: NDArray[np.floating] | None = None,
) -> Any:
    """(fitted, decay) for each decay, the largest first; each begins where the one before it ended.

    Args:
        x_ND: standardised features.
        labels_N: of at least two kinds.
        decays: see :class:`LinearProbe`.
        max_iterations: of each.
        weights_N: how much each sample counts; default: all the same.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    total = float(len(x_ND) if weights_N is None else weights_N.sum())
    before: LogisticRegression | None = None
    for decay in sorted(decays, reverse=True):
        probe = LogisticRegression(C=1 / (decay * total), max_iter=max_iterations, warm_start=True)
        if before is not None:
            probe.coef_, probe.intercept_ = before.coef_.copy(), before.intercept_.copy()
        with warnings.catch_warnings():
            # What is not quite at its end is scored as it is, on validation.
            warnings.simplefilter("ignore", ConvergenceWarning)
            probe.fit(x_ND, labels_N, sample_weight=weights_N)
        before = probe
        yield probe, decay


def scores(probe: LogisticRegression, x_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, C) in the order of `probe.classes_`, of two classes, too."""
    found = probe.decision_function(x_ND)
    both: NDArray[np.float64] = np.stack([-found, found], axis=1) if found.ndim == 1 else found
    return both


def ranks(
    logits_MC: NDArray[np.float64], classes_C: NDArray[Any], labels_M: NDArray[Any]
) -> NDArray[np.int64]:
    """How many classes score at least as high as the right one, (M,); of a label that was not learned all of them."""
    at_M = np.searchsorted(classes_C, labels_M).clip(max=len(classes_C) - 1)
    known_M = classes_C[at_M] == labels_M
    own_M = logits_MC[np.arange(len(at_M)), at_M]
    rank_M = (logits_MC >= own_M[:, None]).sum(axis=1) - 1
    return np.where(known_M, rank_M, len(classes_C)).astype(np.int64)
