"""Detection in torch: the head, the set loss of every decoder layer, and average precision over a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from orchestrator.evaluation.metrics.average_precision import ImageBoxes, average_precision
from orchestrator.models.detr import DetectionHead, detections
from orchestrator.objectives.detection import SetWeights, corners, set_loss
from orchestrator.training.task import Losses


class DetectionGoal:
    """See :class:`orchestrator.stages.finetune.goal.Goal` and `ListsGoal`.

    Predictions are those of :class:`DetectionHead`. Sums are the last layer's loss of each image by itself, and the
    number of images.
    """

    def __init__(
        self, num_classes: int, num_queries: int, width: int, num_layers: int, no_object: float
    ) -> None:
        self.num_classes = num_classes
        self.shape = (num_queries, width, num_layers)
        self.weights = SetWeights(no_object=no_object)

    def head(self, dim: int) -> nn.Module:
        """See `Goal`."""
        return DetectionHead(dim, self.num_classes, *self.shape)

    def losses(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Losses:
        """See `Goal`: the sum over layers; `last_layer` is the last one's alone."""
        real = tensors["weights"] > 0
        classes, boxes = tensors["classes"][real], tensors["boxes"][real]
        layers = [self._loss(of_layer, classes, boxes) for of_layer in predictions[real].unbind(dim=1)]
        # A block that only pads has no image: its loss is 0, with a gradient.
        total = torch.stack(layers).sum() if bool(real.any()) else predictions.sum() * 0
        return Losses(total, {"last_layer": layers[-1].detach() if bool(real.any()) else total.detach()})

    def sums(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Goal`."""
        real = tensors["weights"] > 0
        parts = zip(predictions[real], tensors["classes"][real], tensors["boxes"][real], strict=True)
        each = [self._loss(of_image[-1:], classes[None], boxes[None]) for of_image, classes, boxes in parts]
        total = torch.stack(each).double().sum() if each else predictions.new_zeros((), dtype=torch.float64)
        return torch.stack([total, real.sum().double()])

    def metrics(self, sums_K: Tensor) -> dict[str, float]:
        """See `Goal`: `set_loss` is the mean over images."""
        total, count = sums_K.tolist()
        return {"set_loss": total / count}

    def listed(self, predictions: Tensor, tensors: Mapping[str, Tensor]) -> list[ImageBoxes]:
        """See `ListsGoal`: boxes in shares of the image, each row with its likeliest class."""
        found = []
        for image in torch.nonzero(tensors["weights"] > 0)[:, 0].tolist():
            boxes, scores, classes = detections(predictions[image, -1], self.num_classes)
            there = tensors["classes"][image] >= 0
            found.append(
                ImageBoxes(
                    boxes.double().cpu().numpy(),
                    scores.double().cpu().numpy(),
                    classes.cpu().numpy(),
                    corners(tensors["boxes"][image][there]).double().cpu().numpy(),
                    tensors["classes"][image][there].cpu().numpy(),
                )
            )
        return found

    def scores(self, listed: Sequence[ImageBoxes]) -> dict[str, float]:
        """See `ListsGoal`: `map` and `map_50`; none of a split without an object."""
        return {name: value for name, value in average_precision(listed).items() if value == value}

    def _loss(self, rows_BQK: Tensor, classes_BM: Tensor, boxes_BM4: Tensor) -> Tensor:
        logits, boxes = rows_BQK[..., : self.num_classes + 1], rows_BQK[..., self.num_classes + 1 :]
        return set_loss(logits, boxes, classes_BM, boxes_BM4, self.weights)
