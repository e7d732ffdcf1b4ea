"""Losses of fine-tuning against float64 formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.objectives.supervised import smoothed_cross_entropy


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
