"""Which patches the student does not see: block-wise masks (BEiT, arXiv 2106.08254) with exact counts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_MIN_BLOCK_PATCHES = 4
_LOG_ASPECT = math.log(1 / 0.3)
_ATTEMPTS = 10


def block_masks(
    num_views: int,
    grid_h: int,
    grid_w: int,
    rng: np.random.Generator,
    ratio: tuple[float, float] = (0.1, 0.5),
    probability: float = 0.5,
) -> NDArray[np.bool_]:
    """Masks of all global views of one block of samples.

    Exactly round(`probability`·`num_views`) views are masked, chosen at random. The masked views' ratios are
    spread over `ratio`: the range is cut into as many equal cells as there are masked views, and each view
    has the upper end of its own cell as its ratio (DINOv3 recipe; iBOT, arXiv 2111.07832). The number of masked
    patches is exact, rounded down.

    Args:
        num_views: views in the block (globals × samples).
        grid_h, grid_w: patches of a view along its height and width.
        rng: where all randomness comes from.
        ratio: smallest and largest masked share of a masked view, 0 ≤ low ≤ high ≤ 1.
        probability: share of the views that are masked.

    Returns:
        (num_views, grid_h·grid_w), True where a patch is masked, row-major like the patch tokens.

    Raises:
        ValueError: ratio or probability outside [0, 1], or an empty grid.
    """
    low, high = ratio
    if not (0 <= low <= high <= 1 and 0 <= probability <= 1):
        raise ValueError(f"mask ratio {ratio} and probability {probability} must lie in [0, 1], low first")
    if min(grid_h, grid_w) < 1:
        raise ValueError(f"a grid of {grid_h}×{grid_w} patches cannot be masked")
    masks = np.zeros((num_views, grid_h, grid_w), dtype=bool)
    num_masked = math.floor(num_views * probability + 0.5)
    shares = np.linspace(low, high, num_masked + 1)[1:]
    for share, view in zip(shares, rng.permutation(num_views)[:num_masked], strict=True):
        # Half of 10 is 5 patches, also where the ends of cells are 4.999….
        _fill(masks[view], max(1, int(share * grid_h * grid_w + 1e-9)), rng)
    return masks.reshape(num_views, grid_h * grid_w)


def _fill(mask_HW: NDArray[np.bool_], count: int, rng: np.random.Generator) -> None:
    """Masks exactly `count` patches of an empty mask, in rectangles first and single patches last."""
    left = count
    while left > 0:
        added = _add_rectangle(mask_HW, left, rng)
        if added == 0:
            break
        left -= added
    if left > 0:
        free = np.flatnonzero(~mask_HW)
        mask_HW.reshape(-1)[rng.permutation(free)[:left]] = True


def _add_rectangle(mask_HW: NDArray[np.bool_], most: int, rng: np.random.Generator) -> int:
    """Masks one random rectangle that adds 1 to `most` patches; how many it added, 0 if none was found."""
    grid_h, grid_w = mask_HW.shape
    for _ in range(_ATTEMPTS):
        area = rng.uniform(min(_MIN_BLOCK_PATCHES, most), most)
        aspect = math.exp(rng.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (1 <= height <= grid_h and 1 <= width <= grid_w):
            continue
        top, left = int(rng.integers(grid_h - height + 1)), int(rng.integers(grid_w - width + 1))
        rectangle = mask_HW[top : top + height, left : left + width]
        added = rectangle.size - int(np.count_nonzero(rectangle))
        if 1 <= added <= most:
            rectangle[:] = True
            return added
    return 0
