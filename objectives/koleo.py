"""KoLeo, which spreads features over the sphere (arXiv 1806.03198, section 3.2; DINOv2 and DINOv3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.objectives.precision import widened


def koleo(cls_BD: Tensor, eps: float = 1e-8, group_size: int = 16) -> Tensor:
    """Minus the mean log distance of each sample to its nearest neighbour within its group.

    Groups are runs of `group_size` rows of one block, so the value does not depend on how blocks are spread
    over workers. The last group may be smaller; a sample alone in its group has no neighbour and is left out.

    Args:
        cls_BD: one view's features of one block; L2-normalised here.
        eps: added to the distance before the logarithm.
        group_size: 16 in DINOv3.

    Returns:
        Scalar, float32 (float64 for float64 features); 0 if no sample has a neighbour.
    """
    with torch.autocast(cls_BD.device.type, enabled=False):
        unit_BD = normalize(widened(cls_BD), dim=-1, eps=eps)
        groups = [group for group in torch.split(unit_BD, group_size) if len(group) > 1]
        if not groups:
            return unit_BD.sum() * 0.0
        return torch.cat([-(_nearest_distance(group) + eps).log() for group in groups]).mean()


def _nearest_distance(unit_GD: Tensor) -> Tensor:
    """Euclidean distance of each row to the nearest other row, (G,)."""
    with torch.no_grad():
        similarity_GG = unit_GD @ unit_GD.T
        nearest_G = similarity_GG.fill_diagonal_(-2.0).argmax(dim=1)
    distance_G: Tensor = torch.linalg.vector_norm(unit_GD - unit_GD[nearest_G], dim=-1)
    return distance_G
