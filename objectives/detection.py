"""Detection as the prediction of a set (DETR, arXiv 2005.12872): the pairs of least cost, and the loss of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SetWeights:
    """Of the terms, in matching and loss alike: class, L1 of boxes, generalised IoU; and of rows without an object."""

    classes: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1


def corners(boxes: Tensor) -> Tensor:
    """Boxes (…, 4) as centre x, centre y, width, height → left, top, right, bottom."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def generalised_iou(ours_N4: Tensor, theirs_M4: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of each pair of boxes, as corners: (N, M), from -1 to 1."""
    one, other = ours_N4[:, None], theirs_M4[None]
    inside = (
        torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])
    ).clamp(min=0)
    around = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (one, other)]
    shared = inside.prod(dim=-1)
    union = (areas[0] + areas[1] - shared).clamp(min=1e-9)
    hull = around.prod(dim=-1).clamp(min=1e-9)
    return shared / union - (hull - union) / hull


@torch.no_grad()
def matched(
    logits_QK: Tensor, boxes_Q4: Tensor, classes_M: Tensor, true_M4: Tensor, weights: SetWeights
) -> tuple[Ids, Ids]:
    """The pairs of rows and objects of one image whose cost is least in sum (equation 1).

    The cost of a pair is -p(class) · classes + L1 · l1 - GIoU · giou, in float32.

    Args:
        logits_QK: of C classes and, last, of no object.
        boxes_Q4: as centre and size, in shares of the image.
        classes_M: of the objects.
        true_M4: their boxes, as `boxes_Q4`.
        weights: of the terms.

    Returns:
        Rows, and the objects that they are matched with.
    """
    probability_QM = logits_QK.float().softmax(dim=-1)[:, classes_M]
    distance_QM = torch.cdist(boxes_Q4.float(), true_M4.float(), p=1)
    overlap_QM = generalised_iou(corners(boxes_Q4.float()), corners(true_M4.float()))
    cost = weights.l1 * distance_QM - weights.classes * probability_QM - weights.giou * overlap_QM
    # Of predictions that are not numbers the loss is none either, which training knows how to tell.
    rows, objects = linear_sum_assignment(cost.nan_to_num().cpu().numpy())
    return rows, objects


def set_loss(
    logits_BQK: Tensor, boxes_BQ4: Tensor, classes_BM: Tensor, true_BM4: Tensor, weights: SetWeights
) -> Tensor:
    """The loss of a block of images (equation 2).

    Cross-entropy over all rows, those without an object weighted by `no_object` in a weighted mean; L1 and 1 - GIoU of
    matched boxes, summed and divided by the number of objects of the block (at least 1). In float32.

    Args:
        logits_BQK, boxes_BQ4: see :func:`matched`.
        classes_BM: of the objects, -1 where there is none.
        true_BM4: their boxes.
        weights: of the terms.

    Returns:
        The loss, ().
    """
    none = logits_BQK.shape[-1] - 1
    wanted_BQ = torch.full(logits_BQK.shape[:2], none, dtype=torch.int64, device=logits_BQK.device)
    l1 = giou = logits_BQK.new_zeros((), dtype=torch.float32)
    for image in range(len(logits_BQK)):
        there = classes_BM[image] >= 0
        classes, true = classes_BM[image][there], true_BM4[image][there].float()
        if not len(classes):
            continue
        rows, objects = matched(logits_BQK[image], boxes_BQ4[image], classes, true, weights)
        wanted_BQ[image, rows] = classes[objects]
        ours, theirs = boxes_BQ4[image][rows].float(), true[objects]
        l1 = l1 + (ours - theirs).abs().sum()
        giou = giou + (1 - generalised_iou(corners(ours), corners(theirs)).diagonal()).sum()
    balance = logits_BQK.new_ones(none + 1, dtype=torch.float32)
    balance[none] = weights.no_object
    entropy = F.cross_entropy(logits_BQK.float().flatten(0, 1), wanted_BQ.flatten(), balance)
    count = max(1, int((classes_BM >= 0).sum()))
    return weights.classes * entropy + (weights.l1 * l1 + weights.giou * giou) / count
