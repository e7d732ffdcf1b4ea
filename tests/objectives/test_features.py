"""Maps on unlike grids: resized as the formula of a triangle filter says, on the coarser of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orchestrator.objectives.features import common_grid, feature_loss, resize_tokens


def triangle(before: int, after: int) -> np.ndarray:
    """(after, before): weights of a linear filter whose width grows with the scale, normalised at the edges."""
    scale = before / after
    support = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    weights = 1 - np.abs(np.arange(before) + 0.5 - centres[:, None]) / support
    weights = np.maximum(weights, 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("grid", "wanted"), [((7, 7), (4, 4)), ((8, 8), (2, 2)), ((5, 6), (3, 6)), ((2, 3), (4, 5))]
)
def test_resized_tokens_follow_the_formula(grid: tuple[int, int], wanted: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(2, *grid, 5))
    expected = np.einsum("ab,cd,nbde->nace", triangle(grid[0], wanted[0]), triangle(grid[1], wanted[1]), maps)
    got = resize_tokens(torch.from_numpy(maps).flatten(1, 2), grid, wanted)
    np.testing.assert_allclose(got.numpy(), expected.reshape(2, -1, 5), rtol=1e-9, atol=1e-12)


def test_resizing_and_the_loss_have_the_right_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 9, 4, generator=random, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(2, 4, 4, generator=random, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: feature_loss(resize_tokens(x, (3, 3), (2, 2)), wanted, 0.7), (tokens,)
    )


def test_half_precision_is_resized_in_float32() -> None:
    tokens = torch.full((1, 16, 2), 1000.0, dtype=torch.float16) + torch.arange(16)[None, :, None]
    got = resize_tokens(tokens, (4, 4), (2, 2))
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, resize_tokens(tokens.double(), (4, 4), (2, 2)).half(), rtol=0, atol=0.5)


def test_maps_meet_on_the_coarser_grid_of_each_axis() -> None:
    assert common_grid((7, 7), (16, 16)) == (7, 7)
    assert common_grid((8, 3), (4, 6)) == (4, 3)
    tokens = torch.zeros(1, 6, 2)
    assert resize_tokens(tokens, (2, 3), (2, 3)) is tokens
