"""A small detection head on patches (DETR, arXiv 2005.12872): queries, and a decoder that looks at the patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import MLP, linear
from .vit import BackboneFeatures

_WAVES = 10_000.0


class Attend(nn.Module):
    """Multi-head attention of rows to others; positions are added to queries and keys, not to values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))

    def forward(self, q_BQD: Tensor, k_BND: Tensor, v_BND: Tensor) -> Tensor:
        """(B, Q, D) and (B, N, D) twice → (B, Q, D)."""

        def split(x: Tensor) -> Tensor:
            heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            return heads

        mixed = F.scaled_dot_product_attention(
            split(self.query(q_BQD)), split(self.key(k_BND)), split(self.value(v_BND))
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Queries look at each other, then at the patches, then a feed-forward layer; each normed before and added."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attend(width, num_heads), Attend(width, num_heads)
        self.ffn = MLP(width, 4 * width)

    def forward(self, x_BQD: Tensor, query_QD: Tensor, patches_BPD: Tensor, places_PD: Tensor) -> Tensor:
        """Rows (B, Q, D) with their learnt queries, and patches with their places → (B, Q, D)."""
        x = self.norms[0](x_BQD)
        x_BQD = x_BQD + self.own(x + query_QD, x + query_QD, x)
        x = self.norms[1](x_BQD)
        x_BQD = x_BQD + self.cross(x + query_QD, patches_BPD + places_PD, patches_BPD)
        out: Tensor = x_BQD + self.ffn(self.norms[2](x_BQD))
        return out


class DetectionHead(nn.Module):
    """Boxes and their classes from patches.

    Args:
        dim: width of the features.
        num_classes: of objects.
        num_queries: the most objects of an image.
        width: of the decoder; a multiple of 4 and of `num_heads`.
        num_layers: of the decoder; each gives predictions, which the loss sees.
        num_heads: of its attention.
    """

    def __init__(
        self, dim: int, num_classes: int, num_queries: int, width: int, num_layers: int, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.width = width
        self.inputs = linear(dim, width)
        self.input_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.classes = linear(width, num_classes + 1)
        self.boxes = nn.Sequential(linear(width, width), nn.GELU(), linear(width, 4))
        nn.init.normal_(self.queries)

    def forward(self, features: BackboneFeatures, size: tuple[int, int]) -> Tensor:
        """Features of B images of `size` → float32 (B, L, Q, C + 1 + 4), a row of Q a layer.

        The first C + 1 are logits, of no object last; then centre x, centre y, width and height in shares of the image.
        """
        num_patches = features.patches.shape[1]
        rows = round(math.sqrt(num_patches * size[0] / size[1]))
        patches_BPD = self.input_norm(self.inputs(features.patches))
        places_PD = sine_places(rows, num_patches // rows, self.width).to(patches_BPD)
        x_BQD = torch.zeros_like(self.queries).expand(len(patches_BPD), -1, -1)
        found = []
        for layer in self.layers:
            x_BQD = layer(x_BQD, self.queries, patches_BPD, places_PD)
            x = self.norm(x_BQD)
            found.append(torch.cat([self.classes(x).float(), self.boxes(x).float().sigmoid()], dim=-1))
        return torch.stack(found, dim=1)


def sine_places(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the centres of a grid's cells, row by row: (rows · columns, width)."""
    quarter = width // 4
    waves = _WAVES ** (torch.arange(quarter) / quarter)
    y, x = ((torch.arange(count) + 0.5) / count * 2 * math.pi * 10 for count in (rows, columns))
    parts = [each[:, None] / waves for each in (y, x)]
    of_y, of_x = (torch.cat([part.sin(), part.cos()], dim=-1) for part in parts)
    both = torch.cat([of_y[:, None].expand(-1, columns, -1), of_x[None].expand(rows, -1, -1)], dim=-1)
    return both.flatten(0, 1)


def detections(rows_QK: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of an image → boxes (Q, 4) as corners in shares of it, the probability of the likeliest class, and that."""
    probability_QC = rows_QK[:, : num_classes + 1].softmax(dim=-1)[:, :num_classes]
    scores_Q, classes_Q = probability_QC.max(dim=-1)
    centre, size = rows_QK[:, num_classes + 1 : -2], rows_QK[:, -2:]
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1), scores_Q, classes_Q
