"""Trainable image side of the text alignment, on a frozen vision tower (dino.txt, arXiv 2412.16334)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .blocks import TransformerBlock, draw_rows, linear
from .configs import swiglu_hidden
from .vit import BackboneFeatures

Pool = Literal["cls_and_patches", "cls"]
ImageProjection = Literal["joint", "shared"]


class TextAligner(nn.Module):
    """SwiGLU blocks without RoPE on the frozen tower's tokens; then [CLS, mean of patches], projected.

    The mean keeps local content in the embedding, so that patches can be compared with texts too.

    Args:
        dim: width of the tower.
        output_dim: width of the common space with the text tower. A `shared` projection with patches halves it.
        num_heads: None is one head for 64 channels.
        drop_path: share of rows that skip each residual branch in training.
        pool: `cls` leaves the patches out of the embedding (LiT, arXiv 2111.07991), for comparison.
        projection: `joint` is one matrix of all that is pooled. `shared` is one matrix that CLS and patches have in
            common, each giving half of the embedding, and none at all where the widths fit without.
        hidden: width of the SwiGLU; None is 8/3 dim, rounded up to a multiple of 8.
        qkv_bias: of the blocks.

    Raises:
        ValueError: the heads do not divide dim, or two halves do not make up output_dim.
    """

    def __init__(
        self,
        dim: int,
        output_dim: int,
        num_blocks: int = 2,
        num_heads: int | None = None,
        drop_path: float = 0.3,
        pool: Pool = "cls_and_patches",
        projection: ImageProjection = "joint",
        hidden: int | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        num_heads = num_heads or max(1, dim // 64)
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads ({num_heads})")
        self.dim = dim
        self.drop_path = drop_path
        self.pool = pool
        self.is_shared = projection == "shared"
        hidden = hidden or swiglu_hidden(dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_heads, hidden, ffn="swiglu", qkv_bias=qkv_bias, layer_scale_init=1e-5)
            for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(dim)
        parts = 1 if pool == "cls" else 2
        self.proj: nn.Module
        if not self.is_shared:
            self.proj = linear(parts * dim, output_dim, bias=False)
        elif output_dim % parts:
            raise ValueError(f"output_dim {output_dim} is odd: CLS and patches share it half and half")
        elif parts * dim == output_dim:
            self.proj = nn.Identity()
        else:
            self.proj = linear(dim, output_dim // parts, bias=False)

    def forward(self, features: BackboneFeatures, generator: torch.Generator | None = None) -> Tensor:
        """Embeds images.

        Args:
            features: the frozen tower's (see :class:`BackboneFeatures`).
            generator: source of drop-path rows in training; without one nothing is random.

        Returns:
            (B, output_dim), not normalised.
        """
        cls_BD, patches_BPD = self._tokens(features, generator if self.training else None)
        if self.is_shared:
            parts = [cls_BD] if self.pool == "cls" else [cls_BD, patches_BPD.mean(dim=1)]
            return torch.cat([self.proj(part) for part in parts], dim=-1)
        pooled = cls_BD if self.pool == "cls" else torch.cat([cls_BD, patches_BPD.mean(dim=1)], dim=-1)
        embedding_BE: Tensor = self.proj(pooled)
        return embedding_BE

    def patches(self, features: BackboneFeatures) -> Tensor:
        """Embeds every patch, in the space of the texts.

        The embedding of an image is CLS's part plus the mean of these; where only CLS is pooled, patches are
        projected as if each were it.

        Returns:
            (B, P, output_dim), not normalised.
        """
        _, patches_BPD = self._tokens(features, None)
        if self.is_shared:
            patches_BPD = self.proj(patches_BPD)
        if self.pool != "cls":
            patches_BPD = torch.cat([torch.zeros_like(patches_BPD), patches_BPD], dim=-1)
        embedding_BPE: Tensor = patches_BPD if self.is_shared else self.proj(patches_BPD)
        return embedding_BPE

    def _tokens(self, features: BackboneFeatures, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """CLS (B, D) and patches (B, P, D) after the blocks."""
        x_BND = torch.cat([features.cls[:, None], features.storage, features.patches], dim=1)
        for block in self.blocks:
            rows = [draw_rows(x_BND.shape[0], self.drop_path, generator, x_BND.device) for _ in range(2)]
            x_BND = block(x_BND, None, *rows)
        x_BND = self.norm(x_BND)
        first_patch = 1 + features.storage.shape[1]
        return x_BND[:, 0], x_BND[:, first_patch:]
