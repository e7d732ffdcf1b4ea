"""Causal text tower of the text alignment (dino.txt, arXiv 2412.16334; CLIP, arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .blocks import TransformerBlock, linear

TextInit = Literal["fixed", "by_width"]


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower; the paper's is 24 x 1280 x 20 heads with output_dim 2048 for a ViT-L.

    Attributes:
        context: the longest text, in tokens.
        qkv_bias: of the blocks.
        init: of the blocks' matrices: `fixed` is a standard deviation of 0.02, `by_width` are CLIP's, which follow from
            width and depth.
    """

    vocab_size: int
    context: int = 77
    dim: int = 1280
    depth: int = 24
    num_heads: int = 20
    output_dim: int = 2048
    qkv_bias: bool = True
    init: TextInit = "fixed"

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads ({self.num_heads})")


class TextTower(nn.Module):
    """Token and learnt position embeddings, causal pre-norm blocks, and a projection of the last token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.token_embed = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Parameter(torch.empty(config.context, config.dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.dim, config.num_heads, 4 * config.dim, qkv_bias=config.qkv_bias, causal=True
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.proj = linear(config.dim, config.output_dim, bias=False)
        nn.init.trunc_normal_(self.token_embed.weight, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.01)
        if config.init == "by_width":
            self._init_by_width()

    def _init_by_width(self) -> None:
        """As CLIP (arXiv 2103.00020): what adds to the residual stream is the smaller, the deeper the tower."""
        width_std = self.dim**-0.5
        residual_std = width_std * (2 * self.config.depth) ** -0.5
        for name, weight in self.blocks.named_parameters():
            if name.endswith("attention.qkv.weight"):
                nn.init.normal_(weight, std=width_std)
            elif name.endswith("ffn.up.weight"):
                nn.init.normal_(weight, std=(2 * self.dim) ** -0.5)
            elif name.endswith(("attention.proj.weight", "ffn.down.weight")):
                nn.init.normal_(weight, std=residual_std)

    def forward(self, tokens_BL: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Embeds texts by their end-of-text token.

        Args:
            tokens_BL: int64 (B, L), L at most `context`. What follows the end-of-text token is never seen.
            lengths_B: int64 (B,), number of tokens with the end-of-text token; None: all L.

        Returns:
            (B, output_dim), not normalised.

        Raises:
            ValueError: the texts are longer than `context`.
        """
        batch, length = tokens_BL.shape
        if length > self.config.context:
            raise ValueError(f"texts of {length} tokens; the tower's context is {self.config.context}")
        x_BLD = self.token_embed(tokens_BL) + self.positions[:length]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        last_B = torch.full_like(tokens_BL[:, 0], length - 1) if lengths_B is None else lengths_B - 1
        pooled_BD = x_BLD[torch.arange(batch, device=tokens_BL.device), last_B]
        embedding_BE: Tensor = self.proj(self.norm(pooled_BD))
        return embedding_BE
