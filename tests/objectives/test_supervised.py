"""Losses of fine-tuning against float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.objectives.supervised import (
    pixel_cross_entropy,
    scale_invariant_log,
    smoothed_cross_entropy,
)


def reference(logits: np.ndarray, classes: np.ndarray, weights: np.ndarray, smoothing: float) -> float:
    logits = logits.astype(np.float64)
    count = logits.shape[1]
    top = logits.max(axis=1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    targets = np.full_like(logits, smoothing / count)
    targets[np.arange(len(classes)), classes] += 1 - smoothing
    return float((-(targets * log_p).sum(axis=1) * weights).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_the_formula(smoothing: float, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 4, (9, 5)).astype(np.float32)).to(dtype)
    classes, weights = rng.integers(0, 5, 9), rng.uniform(0, 2, 9).astype(np.float32)
    found = smoothed_cross_entropy(logits, torch.from_numpy(classes), torch.from_numpy(weights), smoothing)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(
        reference(logits.float().numpy(), classes, weights, smoothing), rel=1e-5
    )


def test_rows_that_pad_have_no_influence_and_extremes_have_a_gradient() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 3e4, -3e4]], requires_grad=True)
    found = smoothed_cross_entropy(logits, torch.tensor([1, 0]), torch.tensor([1.0, 0.0]), 0.1)
    found.backward()
    assert torch.isfinite(found)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0


def test_cross_entropy_of_pixels_is_the_mean_of_each_image() -> None:
    rng = np.random.default_rng(1)
    logits, classes = rng.normal(0, 3, (3, 4, 5, 6)), rng.integers(-1, 4, (3, 5, 6))
    classes[2] = -1  # nothing counts
    weights = np.array([1.5, 0.5, 1.0])
    means = []
    for image in range(2):
        there = classes[image] >= 0
        means.append(reference(logits[image][:, there].T, classes[image][there], np.ones(there.sum()), 0.0))
    wanted = np.dot(weights, [*means, 0.0]) / 3
    x = torch.from_numpy(logits.astype(np.float32)).requires_grad_(True)
    found = pixel_cross_entropy(x, torch.from_numpy(classes), torch.from_numpy(weights).float())
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    found.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad[2].abs().sum() == 0


@pytest.mark.parametrize("invariance", [0.0, 0.5, 1.0])
def test_the_error_of_log_depth_is_the_formula(invariance: float) -> None:
    rng = np.random.default_rng(2)
    true, guess = rng.uniform(0.5, 9, (3, 4, 5)), rng.uniform(0.5, 9, (3, 4, 5))
    true[0, 0] = true[1, 2, 3] = 0
    true[2] = 0
    weights = np.array([1.0, 2.0, 1.0])
    wanted = 0.0
    for image in range(2):
        there = true[image] > 0
        d = np.log(guess[image][there]) - np.log(true[image][there])
        wanted += weights[image] * ((d**2).mean() - invariance * d.mean() ** 2) / 3
    x = torch.from_numpy(np.log(guess).astype(np.float32)).requires_grad_(True)
    found = scale_invariant_log(
        x, torch.from_numpy(true).float(), torch.from_numpy(weights).float(), invariance
    )
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    found.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert x.grad[2].abs().sum() == 0
    if invariance == 1:
        other = scale_invariant_log(
            x + 0.7, torch.from_numpy(true).float(), torch.from_numpy(weights).float(), 1.0
        )
        assert float(other.detach()) == pytest.approx(float(found.detach()), rel=1e-4)
