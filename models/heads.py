"""Projection head onto prototypes, of DINO and iBOT (arXiv 2104.14294, 2111.07832, 2508.10104)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import linear

Score = Callable[[Tensor, Tensor], Any]
"""What is made of codes (N, C) and prototypes (K, C) in the place of logits: a tensor or a tuple of tensors."""


class Prototypes(nn.Linear):
    """The bias-free last layer.

    What is made from its weight is made in its own forward: ZeRO-3 has the weight whole only there.
    """

    def __init__(self, bottleneck: int, num_prototypes: int) -> None:
        super().__init__(bottleneck, num_prototypes, bias=False)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, code_NC: Tensor, score: Score | None = None) -> Any:
        """Logits (N, K), or what `score` makes of the codes and the weight."""
        return super().forward(code_NC) if score is None else score(code_NC, self.weight)


class PrototypeHead(nn.Module):
    """Three linear layers with GELU → L2-normalised bottleneck → bias-free linear layer of prototypes.

    The prototypes have no weight normalisation. `prototypes` may be called alone on bottleneck vectors that
    travelled from elsewhere.

    Args:
        dim: width of the tower's features.
        hidden: width of the two hidden layers (8192 for DINO, 4096 for iBOT in the published 7B).
        bottleneck: width of the normalised code (512; 384).
        num_prototypes: 262,144; 98,304.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            linear(dim, hidden), nn.GELU(), linear(hidden, hidden), nn.GELU(), linear(hidden, bottleneck)
        )
        self.prototypes = Prototypes(bottleneck, num_prototypes)

    def forward(
        self, x_ND: Tensor, with_logits: bool = True, score: Score | None = None
    ) -> tuple[Tensor, Any]:
        """(N, D) → unit vectors (N, C), and logits (N, K) unless they are not wanted. Also for (…, D).

        With a `score`, its result takes the logits' place.
        """
        code_NC = self.mlp(x_ND)
        # In low precision the sum of squares of a small code underflows.
        work = torch.promote_types(code_NC.dtype, torch.float32)
        code_NC = F.normalize(code_NC.to(work), dim=-1, eps=1e-6).to(code_NC.dtype)
        if score is not None:
            return code_NC, self.prototypes(code_NC, score=score)
        return code_NC, self.prototypes(code_NC) if with_logits else None
