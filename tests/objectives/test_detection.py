"""The set loss of detection against formulas in float64, and its matching against all permutations."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from orchestrator.objectives.detection import SetWeights, corners, generalised_iou, matched, set_loss


def giou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boxes as corners."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return float(width * height / union - (hull - union) / hull)


def as_corners(box: np.ndarray) -> np.ndarray:
    return np.concatenate([box[:2] - box[2:] / 2, box[:2] + box[2:] / 2])


def boxes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.5, (*shape, 2))], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cost_of(logits: np.ndarray, ours: np.ndarray, classes: np.ndarray, true: np.ndarray) -> np.ndarray:
    p = softmax(logits)
    return np.array(
        [
            [
                5 * np.abs(ours[q] - true[m]).sum()
                - p[q, classes[m]]
                - 2 * giou(as_corners(ours[q]), as_corners(true[m]))
                for m in range(len(classes))
            ]
            for q in range(len(ours))
        ]
    )


def test_overlap_is_the_formula_for_boxes_that_touch_and_that_do_not() -> None:
    one = np.array([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 4.0, 4.0]])
    other = np.array([[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 6.0, 7.0], [1.0, 1.0, 2.0, 2.0]])
    found = generalised_iou(torch.from_numpy(one), torch.from_numpy(other)).numpy()
    for i in range(3):
        for j in range(3):
            assert found[i, j] == pytest.approx(giou(one[i], other[j])), (i, j)
    assert found[0, 0] == pytest.approx(1 / 7 - 2 / 9)
    assert found[1, 1] < -0.9


@pytest.mark.parametrize("seed", range(4))
def test_the_matching_is_the_cheapest_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, ours = rng.normal(0, 2, (5, 4)), boxes(rng, 5)
    classes, true = rng.integers(0, 3, 3), boxes(rng, 3)
    cost = cost_of(logits, ours, classes, true)
    least = min(sum(cost[q, m] for m, q in enumerate(order)) for order in permutations(range(5), 3))
    tensors = (torch.from_numpy(each) for each in (logits, ours, classes, true))
    rows, objects = matched(*tensors, SetWeights())
    assert sorted(objects.tolist()) == [0, 1, 2]
    assert cost[rows, objects].sum() == pytest.approx(least, rel=1e-5)


def test_the_loss_is_the_formula_over_a_block() -> None:
    rng = np.random.default_rng(7)
    logits, ours = rng.normal(0, 2, (3, 5, 4)), boxes(rng, 3, 5)
    classes, true = rng.integers(0, 3, (3, 3)), boxes(rng, 3, 3)
    classes[0, 2] = -1
    classes[1] = -1  # an image without objects
    entropy = weight = l1 = overlap = 0.0
    for image in range(3):
        there = classes[image] >= 0
        wanted = np.full(5, 3)
        if there.any():
            cost = cost_of(logits[image], ours[image], classes[image][there], true[image][there])
            count = int(there.sum())
            best = min(
                permutations(range(5), count), key=lambda order: sum(cost[q, m] for m, q in enumerate(order))
            )
            for m, q in enumerate(best):
                wanted[q] = classes[image][there][m]
                l1 += np.abs(ours[image][q] - true[image][there][m]).sum()
                overlap += 1 - giou(as_corners(ours[image][q]), as_corners(true[image][there][m]))
        p = softmax(logits[image])
        for q in range(5):
            w = 0.1 if wanted[q] == 3 else 1.0
            entropy -= w * np.log(p[q, wanted[q]])
            weight += w
    expected = entropy / weight + (5 * l1 + 2 * overlap) / 5
    x = torch.from_numpy(logits.astype(np.float32)).requires_grad_(True)
    y = torch.from_numpy(ours.astype(np.float32)).requires_grad_(True)
    found = set_loss(x, y, torch.from_numpy(classes), torch.from_numpy(true), SetWeights())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.isfinite(x.grad).all()
    assert y.grad[1].abs().sum() == 0, "no box is asked for where there is no object"


def test_boxes_without_an_area_have_a_finite_gradient() -> None:
    y = torch.tensor([[[0.5, 0.5, 0.0, 0.0]]], requires_grad=True)
    true = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    set_loss(torch.zeros(1, 1, 3), y, torch.zeros(1, 1, dtype=torch.int64), true, SetWeights()).backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()
    torch.testing.assert_close(corners(true)[0, 0], torch.tensor([0.4, 0.4, 0.6, 0.6]))


def test_predictions_that_are_no_numbers_have_a_loss_that_is_none() -> None:
    """And no traceback of scipy's: training tells of a loss that is not a number."""
    logits, found = torch.full((1, 3, 3), torch.nan), torch.full((1, 3, 4), torch.nan)
    loss = set_loss(logits, found, torch.tensor([[1]]), torch.full((1, 1, 4), 0.5), SetWeights())
    assert loss.isnan()
