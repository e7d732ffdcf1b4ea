"""Two figures that show dense features decaying in long training (DINOv3, arXiv 2508.10104, section 4.1).

There, patches grow similar to CLS and similarity maps lose locality while image-level scores still rise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from orchestrator.objectives.precision import widened


@torch.no_grad()
def cls_patch_cosine(cls_BD: Tensor, patches_BPD: Tensor) -> Tensor:
    """Mean cosine between CLS and the patches of the same image: scalar in [-1, 1]; rising is bad."""
    return cosine_similarity(widened(cls_BD)[:, None], widened(patches_BPD), dim=-1).mean()


@torch.no_grad()
def patch_locality(patches_BPD: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """How far near patches are more alike than distant ones: scalar in [-1, 1]; falling is bad.

    Per image, Pearson's correlation over all pairs of different patches between their cosine similarity and
    minus their Euclidean distance on the grid; then the mean over images. An image whose patches are all
    equally alike, and a grid on which all pairs are equally far, count as 0.

    Args:
        patches_BPD: patch features, row by row of the grid.
        grid_hw: its height and width in patches, h·w = P.

    Raises:
        ValueError: the grid does not have P cells.
    """
    height, width = grid_hw
    num_patches = patches_BPD.shape[1]
    if height * width != num_patches:
        raise ValueError(f"a {height}×{width} grid does not have {num_patches} patches")
    device = patches_BPD.device
    first, second = torch.triu_indices(num_patches, num_patches, offset=1, device=device).unbind()
    with torch.autocast(device.type, enabled=False):
        unit_BPD = normalize(widened(patches_BPD), dim=-1)
        across = (first % width - second % width).to(unit_BPD.dtype)
        down = (first // width - second // width).to(unit_BPD.dtype)
        closeness = -torch.hypot(across, down)
        # Image by image: all pairs of a whole batch would be B·P² numbers at once.
        scores = [_correlation((unit_PD @ unit_PD.T)[first, second], closeness) for unit_PD in unit_BPD]
    return torch.stack(scores).mean()


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.mean(), second - second.mean()
    norms = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    # Rounding alone makes equal similarities differ by about 1e-7; that is not a spread to correlate with.
    has_spread = (first.abs().amax() > 1e-5) & (second.abs().amax() > 1e-5)
    return torch.where(has_spread, (first * second).sum() / norms.clamp_min(1e-12), torch.zeros_like(norms))
