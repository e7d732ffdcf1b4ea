"""Segmentation and depth in torch: heads, losses, and metrics over all pixels of a split."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orchestrator.models.predictors import DepthHead, MapHead
from orchestrator.objectives.supervised import pixel_cross_entropy, scale_invariant_log
from orchestrator.training.task import Losses

_DELTA = 1.25


class SegmentationGoal:
    """See :class:`orchestrator.stages.finetune.goal.Goal`.

    Sums are pixels by class: right, guessed and true (3 · C).
    """

    def __init__(self, num_classes: int, width: int, num_doublings: int) -> None:
        self.num_classes, self.width, self.num_doublings = num_classes, width, num_doublings

    def head(self, dim: int) -> nn.Module:
        """See `Goal`."""
        return MapHead(dim, self.num_classes, self.width, self.num_doublings)

    def losses(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Losses:
        """See `Goal`."""
        return Losses(pixel_cross_entropy(predictions, tensors["classes"], tensors["weights"]), {})

    def sums(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Goal`."""
        true_BHW = tensors["classes"]
        there = (true_BHW >= 0) & (tensors["weights"] > 0)[:, None, None]
        guess, true = predictions.argmax(dim=1)[there], true_BHW[there]
        parts = (true[guess == true], guess, true)
        return torch.cat([torch.bincount(part, minlength=self.num_classes) for part in parts]).double()

    def metrics(self, sums_K: Tensor) -> dict[str, float]:
        """See `Goal`.

        `mean_iou` is the mean over classes of intersection by union; classes that are neither guessed nor there do not
        count. `pixel_accuracy` is of all pixels that count.
        """
        right_C, guessed_C, true_C = sums_K.chunk(3)
        union_C = guessed_C + true_C - right_C
        there = union_C > 0
        return {
            "mean_iou": float((right_C[there] / union_C[there]).mean()),
            "pixel_accuracy": float(right_C.sum() / true_C.sum()),
        }


class DepthGoal:
    """See :class:`orchestrator.stages.finetune.goal.Goal`.

    Sums are of pixels that have a depth: their number, squared errors, relative errors, and those within 1.25 times.
    """

    def __init__(
        self,
        invariance: float,
        nearest: float,
        farthest: float,
        num_bins: int | None,
        width: int,
        num_doublings: int,
    ) -> None:
        self.invariance = invariance
        self.shape = (nearest, farthest, num_bins, width, num_doublings)

    def head(self, dim: int) -> nn.Module:
        """See `Goal`."""
        return DepthHead(dim, *self.shape)

    def losses(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Losses:
        """See `Goal`."""
        loss = scale_invariant_log(predictions, tensors["depth"], tensors["weights"], self.invariance)
        return Losses(loss, {})

    def sums(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Goal`."""
        true_BHW = tensors["depth"].double()
        there = (true_BHW > 0) & (tensors["weights"] > 0)[:, None, None]
        guess, true = predictions.double().exp()[there], true_BHW[there]
        ratio = torch.maximum(guess / true, true / guess)
        error = guess - true
        return torch.stack(
            [
                there.sum().double(),
                error.square().sum(),
                (error.abs() / true).sum(),
                (ratio < _DELTA).sum().double(),
            ]
        )

    def metrics(self, sums_K: Tensor) -> dict[str, float]:
        """See `Goal`.

        `rmse` is the root of the mean squared error in metres over all pixels that have a depth, `delta_1` the share of
        them whose ratio to the truth is below 1.25 either way, `relative_error` the mean of error by truth; all are nan
        where no pixel has one.
        """
        count, square, relative, within = sums_K.tolist()
        count = count or math.nan
        return {
            "rmse": (square / count) ** 0.5,
            "delta_1": within / count,
            "relative_error": relative / count,
        }
