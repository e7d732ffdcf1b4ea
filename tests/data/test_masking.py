"""Block masks: exact counts, ratios spread over the range, patches that hang together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from orchestrator.data.masking import block_masks
from orchestrator.data.rng import generator
from orchestrator.stages.common.flops import masked_share


@pytest.mark.parametrize("num_views", [1, 2, 7, 32])
def test_exactly_half_of_the_views_are_masked(num_views: int) -> None:
    masks = block_masks(num_views, 8, 8, generator(num_views))
    assert masks.shape == (num_views, 64)
    assert masks.dtype == bool
    assert np.count_nonzero(masks.any(1)) == int(num_views / 2 + 0.5)


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (7, 9), (2, 2)])
@pytest.mark.parametrize("num_views", [2, 8, 33, 64])
def test_each_masked_view_has_the_exact_count_of_its_cell(num_views: int, grid: tuple[int, int]) -> None:
    """The paper's 0.1–0.5, cut into as many equal cells as there are masked views: one view at each cell's end."""
    for seed in range(5):
        counts = np.sort(block_masks(num_views, *grid, generator(seed)).sum(1))
        masked = counts[counts > 0]
        ends = np.linspace(0.1, 0.5, len(masked) + 1)[1:] * grid[0] * grid[1]
        assert len(masked) == (num_views + 1) // 2
        assert np.array_equal(masked, np.maximum(1, np.floor(ends + 1e-9)))


def test_the_share_of_masked_tokens_is_the_published_one() -> None:
    """16 images of 256 px a device: 16 of 32 crops are masked, 0.311 of their tokens (recipe.md)."""
    masks = block_masks(32, 16, 16, generator(0))
    masked = masks[masks.any(1)]
    assert len(masked) == 16
    assert masked.mean() == pytest.approx(0.311, abs=5e-4)
    share = masked_share(0.5, (0.1, 0.5), 32)
    assert masks.mean() == pytest.approx(share, abs=1 / 256), "what is planned with"
    assert share == pytest.approx(0.5 * (0.3 + 0.2 / 16))


def test_any_view_may_have_any_ratio() -> None:
    counts = np.array([block_masks(8, 20, 20, generator(seed)).sum(1) for seed in range(400)])
    assert np.array_equal(np.sort(counts, axis=1)[:, 4:], np.tile([80, 120, 160, 200], (400, 1)))
    largest = np.bincount(counts.argmax(1), minlength=8)
    assert stats.chisquare(largest).pvalue > 1e-4


@pytest.mark.parametrize("ratio", [(0.5, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_counts_are_exact(ratio: tuple[float, float]) -> None:
    masks = block_masks(6, 7, 9, generator(1), ratio, probability=1.0)
    assert set(masks.sum(1).tolist()) == {max(1, int(ratio[0] * 63))}


def test_masked_patches_hang_together() -> None:
    def neighbours(masks: np.ndarray) -> float:
        grid = masks.reshape(-1, 14, 14)
        return float((grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid.sum())

    masks = block_masks(64, 14, 14, generator(2), (0.3, 0.3), 1.0)
    scattered = np.array([generator(3, i).permutation(masks[0]) for i in range(64)])
    assert neighbours(masks) > 1.8 * neighbours(scattered)


def test_masks_depend_on_the_generator_only() -> None:
    assert np.array_equal(block_masks(8, 8, 8, generator(5)), block_masks(8, 8, 8, generator(5)))
    assert not np.array_equal(block_masks(8, 8, 8, generator(5)), block_masks(8, 8, 8, generator(6)))


def test_which_views_are_masked_varies() -> None:
    chosen = np.array([block_masks(8, 4, 4, generator(i)).any(1) for i in range(100)])
    assert np.all(np.abs(chosen.mean(0) - 0.5) < 0.2)


@pytest.mark.parametrize(
    ("grid", "ratio", "probability"),
    [
        ((8, 8), (0.5, 0.1), 0.5),
        ((8, 8), (0.1, 1.5), 0.5),
        ((8, 8), (0.1, 0.5), -0.1),
        ((0, 8), (0.1, 0.5), 0.5),
    ],
)
def test_impossible_arguments_are_refused(
    grid: tuple[int, int], ratio: tuple[float, float], probability: float
) -> None:
    with pytest.raises(ValueError, match="mask"):
        block_masks(4, *grid, generator(0), ratio, probability)
