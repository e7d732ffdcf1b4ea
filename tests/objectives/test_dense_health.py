from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.objectives.dense_health import cls_patch_cosine, patch_locality


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_features(height: int, width: int, dim: int) -> Tensor:
    """Random features averaged over a 3×3 window, so that neighbours share most of what they are made of."""
    return torch.nn.functional.avg_pool2d(randn(1, dim, height + 2, width + 2), 3, 1).flatten(2).mT


def naive_locality(patches: Tensor, height: int, width: int) -> float:
    cells = [(r, c) for r in range(height) for c in range(width)]
    x = torch.nn.functional.normalize(patches.double(), dim=-1).numpy()
    pairs = [(i, j) for i in range(len(cells)) for j in range(i)]
    near = [-np.hypot(cells[i][0] - cells[j][0], cells[i][1] - cells[j][1]) for i, j in pairs]
    return float(np.mean([np.corrcoef([image[i] @ image[j] for i, j in pairs], near)[0, 1] for image in x]))


def test_cosine_is_the_mean_over_patches_and_images() -> None:
    cls, patches = randn(3, 5), randn(3, 4, 5, seed=1)
    expected = [
        float(c @ p / c.norm() / p.norm()) for c, image in zip(cls, patches, strict=True) for p in image
    ]
    assert cls_patch_cosine(cls, patches).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert cls_patch_cosine(cls, cls[:, None].expand(3, 4, 5) * 3).item() == pytest.approx(1.0)


def test_locality_equals_pearsons_correlation() -> None:
    patches = randn(2, 15, 6)
    assert patch_locality(patches, (3, 5)).item() == pytest.approx(naive_locality(patches, 3, 5), abs=1e-5)


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
