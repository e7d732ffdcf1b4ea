"""Classification in torch: the linear head, cross-entropy, and accuracy over all images and over classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orchestrator.models.predictors import ClassHead, Pool
from orchestrator.objectives.supervised import smoothed_cross_entropy
from orchestrator.training.task import Losses


class ClassGoal:
    """See :class:`orchestrator.stages.finetune.goal.Goal`.

    Sums are, of C classes: right answers by class (C), images by class (C), and the sum of the images' cross-entropy
    without smoothing (1).
    """

    def __init__(self, num_classes: int, pool: Pool, label_smoothing: float) -> None:
        self.num_classes, self.pool, self.label_smoothing = num_classes, pool, label_smoothing

    def head(self, dim: int) -> nn.Module:
        """See `Goal`."""
        return ClassHead(dim, self.num_classes, self.pool)

    def losses(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Losses:
        """See `Goal`; the figure of a step is `accuracy`."""
        classes_B, weights_B = tensors["classes"], tensors["weights"]
        loss = smoothed_cross_entropy(predictions, classes_B, weights_B, self.label_smoothing)
        hit_B = (predictions.argmax(dim=-1) == classes_B).to(weights_B.dtype)
        return Losses(loss, {"accuracy": (hit_B * weights_B).mean()})

    def sums(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Goal`."""
        real = tensors["weights"] > 0
        logits_BC, classes_B = predictions[real].double(), tensors["classes"][real]
        hit_B = (logits_BC.argmax(dim=-1) == classes_B).double()
        right_C = hit_B.new_zeros(self.num_classes).index_add(0, classes_B, hit_B)
        count_C = hit_B.new_zeros(self.num_classes).index_add(0, classes_B, torch.ones_like(hit_B))
        loss = torch.nn.functional.cross_entropy(logits_BC, classes_B, reduction="sum")
        return torch.cat([right_C, count_C, loss[None]])

    def metrics(self, sums_K: Tensor) -> dict[str, float]:
        """See `Goal`.

        `accuracy` is of all images, `mean_class_accuracy` the mean over the classes that the split has, `cross_entropy`
        in nats.
        """
        right_C, count_C, loss = sums_K.split([self.num_classes, self.num_classes, 1])
        there = count_C > 0
        return {
            "accuracy": float(right_C.sum() / count_C.sum()),
            "mean_class_accuracy": float((right_C[there] / count_C[there]).mean()),
            "cross_entropy": float(loss / count_C.sum()),
        }
