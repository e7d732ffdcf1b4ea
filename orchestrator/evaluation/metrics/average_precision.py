"""Average precision of boxes as COCO has it: 101 recalls, ten overlaps from 0.5 to 0.95, at most 100 boxes an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
Counts = NDArray[np.integer]
Flags = NDArray[np.bool_]

OVERLAPS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST = 100


def _no_boxes() -> Floats:
    return np.empty((0, 4))


def _no_classes() -> Ids:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class ImageBoxes:
    """What was found in an image, and what is there.

    Attributes:
        boxes, scores, classes: (N, 4) as corners, (N,) and (N,).
        true_boxes, true_classes: (M, 4) and (M,).
        crowd_boxes, crowd_classes: (K, 4) and (K,), of groups of things (`iscrowd`): what is found in them is neither
            right nor wrong.
    """

    boxes: Floats
    scores: Floats
    classes: Ids
    true_boxes: Floats
    true_classes: Ids
    crowd_boxes: Floats = field(default_factory=_no_boxes)
    crowd_classes: Ids = field(default_factory=_no_classes)


def average_precision(images: Sequence[ImageBoxes]) -> dict[str, float]:
    """`map` over all overlaps and `map_50` at 0.5: means over the classes that are there; nan where none is."""
    return Precisions(images).of(np.ones(len(images), dtype=np.int64))


class Precisions:
    """Average precision of any draw of images: which box is right is decided once.

    Args:
        images: all of them.
    """

    def __init__(self, images: Sequence[ImageBoxes]) -> None:
        present = sorted({int(one) for image in images for one in image.true_classes})
        self._classes = [_ranked(images, one) for one in present]

    def of(self, counts_I: Counts) -> dict[str, float]:
        """`map` and `map_50` where each image occurs so often; nan without an object."""
        found = [one.precision(counts_I) for one in self._classes if (one.num_true_I * counts_I).any()]
        if not found:
            return {"map": float("nan"), "map_50": float("nan")}
        table = np.array(found)
        return {"map": float(table.mean()), "map_50": float(table[:, 0].mean())}


@dataclass(frozen=True)
class _Ranked:
    """The boxes of one class, the surest first.

    Attributes:
        image_N: of which image each is.
        right_TN, counts_TN: whether each is right, and whether it counts, at each overlap.
        num_true_I: objects of each image.
    """

    image_N: Ids
    right_TN: Flags
    counts_TN: Flags
    num_true_I: Ids

    def precision(self, counts_I: Counts) -> Floats:
        """Average precision at each overlap, (T,), where each image occurs so often."""
        weights_N = counts_I[self.image_N].astype(np.float64)
        right_TN = (self.right_TN * weights_N).cumsum(axis=1)
        all_TN = (self.counts_TN * weights_N).cumsum(axis=1)
        precision_TN = np.divide(right_TN, all_TN, out=np.zeros_like(right_TN), where=all_TN > 0)
        precision_TN = np.maximum.accumulate(precision_TN[:, ::-1], axis=1)[:, ::-1]
        recall_TN = right_TN / float((self.num_true_I * counts_I).sum())
        found = []
        for precision_N, recall_N in zip(precision_TN, recall_TN, strict=True):
            at = np.searchsorted(recall_N, _RECALLS, side="left")
            reached = np.append(precision_N, 0.0)[at]
            found.append(reached.mean())
        return np.array(found)


def overlaps(ours_N4: Floats, theirs_M4: Floats, crowd: bool = False) -> Floats:
    """Intersection by union of each pair of boxes, (N, M); of groups the intersection by the area of ours."""
    one, other = ours_N4[:, None], theirs_M4[None]
    inside = np.clip(
        np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None
    )
    shared = inside.prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (one, other)]
    union = np.broadcast_to(areas[0], shared.shape) if crowd else areas[0] + areas[1] - shared
    found: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return found


def _ranked(images: Sequence[ImageBoxes], wanted: int) -> _Ranked:
    scores, rights, counted, of, num_true = [], [], [], [], []
    for number, image in enumerate(images):
        ours, theirs = image.classes == wanted, image.true_classes == wanted
        num_true.append(int(theirs.sum()))
        order = np.argsort(-image.scores[ours], kind="stable")[:_MOST]
        boxes_N4 = image.boxes[ours][order]
        right_TN = _matched(overlaps(boxes_N4, image.true_boxes[theirs]))
        grouped_N = overlaps(boxes_N4, image.crowd_boxes[image.crowd_classes == wanted], crowd=True).max(
            axis=1, initial=0.0
        )
        scores.append(image.scores[ours][order])
        rights.append(right_TN)
        counted.append(right_TN | (grouped_N < _least(OVERLAPS)[:, None]))
        of.append(np.full(len(order), number))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _Ranked(
        np.concatenate(of)[order],
        np.concatenate(rights, axis=1)[:, order],
        np.concatenate(counted, axis=1)[:, order],
        np.array(num_true, dtype=np.int64),
    )


def _least(overlap: Floats) -> Floats:
    return np.minimum(overlap, 1 - 1e-10)


def _matched(overlap_NM: Floats) -> Flags:
    """Which boxes are right at each overlap, (T, N): the surest first takes the free object that it covers best."""
    count, objects = overlap_NM.shape
    hits_TN = np.zeros((len(OVERLAPS), count), dtype=bool)
    for place, least in enumerate(_least(OVERLAPS)):
        free = np.ones(objects, dtype=bool)
        for row in range(count):
            candidates = np.flatnonzero(free & (overlap_NM[row] >= least))
            if len(candidates):
                # Of equally good ones the last, as COCO's code does.
                best = candidates[::-1][overlap_NM[row, candidates[::-1]].argmax()]
                free[best], hits_TN[place, row] = False, True
    return hits_TN
