"""Trainable image side of the text alignment, on a frozen vision tower (dino.txt, arXiv 2412.16334)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import Block, draw_rows, linear
from .vit import Features


class TextAligner(nn.Module):
    """SwiGLU blocks without RoPE on the frozen tower's tokens; then [CLS, mean of patches], projected.

    The mean keeps local content in the embedding, so that patches can be compared with texts too.

    Args:
        dim: width of the tower.
        output_dim: width of the common space with the text tower.
        num_heads: None is one head for 64 channels.
        drop_path: share of rows that skip each residual branch in training.

    Raises:
        ValueError: the heads do not divide dim.
    """

    def __init__(
        self,
        dim: int,
        output_dim: int,
        num_blocks: int = 2,
        num_heads: int | None = None,
        drop_path: float = 0.3,
    ) -> None:
        super().__init__()
        num_heads = num_heads or max(1, dim // 64)
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads ({num_heads})")
        self.dim = dim
        self.drop_path = drop_path
        # 8/3 dim, in multiples of 8: as many parameters as an MLP of 4 dim.
        hidden = -(-8 * dim // 24) * 8
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, hidden, ffn="swiglu", layer_scale_init=1e-5) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        self.proj = linear(2 * dim, output_dim, bias=False)

    def forward(self, features: Features, generator: torch.Generator | None = None) -> Tensor:
        """Embeds images.

        Args:
            features: the frozen tower's (see :class:`Features`).
            generator: source of drop-path rows in training; without one nothing is random.

        Returns:
            (B, output_dim), not normalised.
        """
        random = generator if self.training else None
        x_BND = torch.cat([features.cls[:, None], features.storage, features.patches], dim=1)
        for block in self.blocks:
            rows = [draw_rows(x_BND.shape[0], self.drop_path, random, x_BND.device) for _ in range(2)]
            x_BND = block(x_BND, None, *rows)
        x_BND = self.norm(x_BND)
        first_patch = 1 + features.storage.shape[1]
        pooled_BE = torch.cat([x_BND[:, 0], x_BND[:, first_patch:].mean(dim=1)], dim=-1)
        embedding_BE: Tensor = self.proj(pooled_BE)
        return embedding_BE
