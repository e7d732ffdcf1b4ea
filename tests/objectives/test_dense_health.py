"""The two figures of dense health against float64 formulas, and that they tell good features from bad."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.objectives.dense_health import cls_patch_cosine, patch_locality

from .naive import randn


def smooth_features(height: int, width: int, dim: int) -> Tensor:
    """Random features averaged over a 3×3 window, so that neighbours share most of what they are made of."""
    return torch.nn.functional.avg_pool2d(randn(1, dim, height + 2, width + 2), 3, 1).flatten(2).mT


def naive_locality(patches: Tensor, height: int, width: int) -> float:
    cells = [(r, c) for r in range(height) for c in range(width)]
    x = torch.nn.functional.normalize(patches.double(), dim=-1).numpy()
    pairs = [(i, j) for i in range(len(cells)) for j in range(i)]
    near = [-np.hypot(cells[i][0] - cells[j][0], cells[i][1] - cells[j][1]) for i, j in pairs]
    return float(np.mean([np.corrcoef([image[i] @ image[j] for i, j in pairs], near)[0, 1] for image in x]))


# Patches of a 3×5 grid with their CLS tokens.
FEATURES: dict[str, tuple[Tensor, Tensor]] = {
    "moderate": (randn(3, 6), randn(3, 15, 6, seed=1)),
    "one image": (randn(1, 6), randn(1, 15, 6, seed=1)),
    "1e4": (1e4 * randn(3, 6), 1e-4 * randn(3, 15, 6, seed=1)),
    "duplicate patches": (randn(3, 6), randn(3, 5, 6, seed=1).repeat(1, 3, 1)),
    "almost equal patches": (randn(3, 6), randn(3, 1, 6, seed=1) + 0.03 * randn(3, 15, 6, seed=2)),
    "bfloat16": (randn(3, 6).bfloat16(), randn(3, 15, 6, seed=1).bfloat16()),
    "non-contiguous": (randn(6, 3).T, randn(6, 15, 3, seed=1).permute(2, 1, 0)),
}


@pytest.mark.parametrize("case", FEATURES)
def test_both_figures_equal_float64_formulas(case: str) -> None:
    cls, patches = FEATURES[case]
    c, p = cls.double(), patches.double()
    cosines = [
        float(c[b] @ p[b, i] / c[b].norm() / p[b, i].norm()) for b in range(len(c)) for i in range(p.shape[1])
    ]
    locality = naive_locality(patches, 3, 5)
    for x, y, precision in ((cls, patches, 1e-4), (c, p, 1e-11)):
        figures = cls_patch_cosine(x, y), patch_locality(y, (3, 5))
        assert {figure.dtype for figure in figures} == {torch.float64 if x is c else torch.float32}
        assert figures[0].item() == pytest.approx(np.mean(cosines), abs=precision)
        assert figures[1].item() == pytest.approx(locality, abs=precision)


def test_cosine_of_patches_along_cls_is_one() -> None:
    cls = randn(3, 5)
    assert cls_patch_cosine(cls, cls[:, None].expand(3, 4, 5) * 3).item() == pytest.approx(1.0)


def test_smooth_maps_are_local_and_shuffled_ones_are_not() -> None:
    patches = smooth_features(8, 6, 64)
    shuffled = patches[:, torch.randperm(48, generator=torch.Generator().manual_seed(3))]
    assert patch_locality(patches, (8, 6)).item() > 0.4
    assert abs(patch_locality(shuffled, (8, 6)).item()) < 0.15
    # The grid matters: read with height and width exchanged, the same features are less local.
    assert patch_locality(patches, (6, 8)) < patch_locality(patches, (8, 6)) - 0.1


def test_a_line_of_turning_vectors_is_perfectly_ordered() -> None:
    angles = torch.linspace(0, 1.0, 9)
    patches = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    assert patch_locality(patches, (1, 9)).item() > 0.95


def test_equal_patches_count_as_zero() -> None:
    assert patch_locality(randn(2, 1, 300).expand(2, 36, 300), (6, 6)).item() == 0.0
    assert patch_locality(randn(2, 2, 8), (1, 2)).item() == 0.0


def test_a_wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="4×4"):
        patch_locality(randn(1, 15, 3), (4, 4))
