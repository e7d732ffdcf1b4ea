"""A teacher without weights: the mean strength of edges in each patch, by colour and direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PATCH = 8


class Edges(nn.Module):
    """Images (B, 3, H, W) → a map (B, 6, H/8, W/8), which the feature objective takes for patch features."""

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        # Of each colour channel one filter across and one along.
        self.filters: Tensor
        self.register_buffer("filters", torch.stack([across, across.T])[:, None].repeat(3, 1, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """The map."""
        edges = F.conv2d(images_BCHW, self.filters.to(images_BCHW.dtype), padding=1, groups=3)
        return F.avg_pool2d(edges.abs(), _PATCH)
