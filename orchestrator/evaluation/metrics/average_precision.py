"""Average precision of boxes as COCO has it: 101 recalls, ten overlaps from 0.5 to 0.95, at most 100 boxes an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

OVERLAPS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_MOST = 100


@dataclass(frozen=True)
class ImageBoxes:
    """What was found in an image, and what is there.

    Attributes:
        boxes, scores, classes: (N, 4) as corners, (N,) and (N,).
        true_boxes, true_classes: (M, 4) and (M,).
    """

    boxes: Floats
    scores: Floats
    classes: Ids
    true_boxes: Floats
    true_classes: Ids


def average_precision(images: Sequence[ImageBoxes]) -> dict[str, float]:
    """`map` over all overlaps and `map_50` at 0.5: means over the classes that are there; nan where none is."""
    present = sorted({int(one) for image in images for one in image.true_classes})
    if not present:
        return {"map": float("nan"), "map_50": float("nan")}
    table = np.array([_of_class(images, one) for one in present])
    return {"map": float(table.mean()), "map_50": float(table[:, 0].mean())}


def overlaps(ours_N4: Floats, theirs_M4: Floats) -> Floats:
    """Intersection by union of each pair of boxes, (N, M)."""
    one, other = ours_N4[:, None], theirs_M4[None]
    inside = np.clip(
        np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2]), 0, None
    )
    shared = inside.prod(axis=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (one, other)]
    union = areas[0] + areas[1] - shared
    found: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return found


def _of_class(images: Sequence[ImageBoxes], wanted: int) -> Floats:
    """Average precision of a class at each overlap."""
    scores, hits, num_true = [], [], 0
    for image in images:
        ours, theirs = image.classes == wanted, image.true_classes == wanted
        num_true += int(theirs.sum())
        order = np.argsort(-image.scores[ours], kind="stable")[:_MOST]
        scores.append(image.scores[ours][order])
        hits.append(_matched(overlaps(image.boxes[ours][order], image.true_boxes[theirs])))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits_TN = np.concatenate(hits, axis=1)[:, order]
    right_TN = hits_TN.cumsum(axis=1)
    found = []
    for right_N in right_TN:
        precision_N = right_N / np.arange(1, len(right_N) + 1)
        precision_N = np.maximum.accumulate(precision_N[::-1])[::-1]
        at = np.searchsorted(right_N / num_true, _RECALLS, side="left")
        found.append(
            np.where(at < len(right_N), np.append(precision_N, 0.0)[np.minimum(at, len(right_N))], 0.0).mean()
        )
    return np.array(found)


def _matched(overlap_NM: Floats) -> NDArray[np.bool_]:
    """Which boxes are right at each overlap, (T, N): the surest first takes the free object that it covers best."""
    count, objects = overlap_NM.shape
    hits_TN = np.zeros((len(OVERLAPS), count), dtype=bool)
    for place, least in enumerate(OVERLAPS):
        free = np.ones(objects, dtype=bool)
        for row in range(count):
            candidates = np.flatnonzero(free & (overlap_NM[row] >= min(least, 1 - 1e-10)))
            if len(candidates):
                # Of equally good ones the last, as COCO's code does.
                best = candidates[::-1][overlap_NM[row, candidates[::-1]].argmax()]
                free[best], hits_TN[place, row] = False, True
    return hits_TN
