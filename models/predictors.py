"""What makes predictions of a backbone's features: the heads that fine-tuning trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import linear
from .vit import Features

Pool = Literal["cls", "cls_and_patches"]


class ClassHead(nn.Module):
    """One linear layer on CLS, or on CLS and the mean of the patches.

    Args:
        dim: width of the features.
        num_classes: of the logits.
        pool: see above.
    """

    def __init__(self, dim: int, num_classes: int, pool: Pool = "cls_and_patches") -> None:
        super().__init__()
        self.pool = pool
        self.linear = linear(dim if pool == "cls" else 2 * dim, num_classes)

    def forward(self, features: Features, size: tuple[int, int] | None = None) -> Tensor:
        """Features of B images → logits (B, C). `size` is accepted for the common signature."""
        pooled = features.cls
        if self.pool == "cls_and_patches":
            pooled = torch.cat([pooled, features.patches.mean(dim=1)], dim=-1)
        logits: Tensor = self.linear(pooled)
        return logits


def head_of(record: Mapping[str, Any], dim: int, num_classes: int) -> nn.Module:
    """The head that a model folder describes, with random weights.

    Args:
        record: its `type` and settings.
        dim: width of the backbone's features.
        num_classes: of the task.

    Raises:
        ValueError: of a type that this version does not know, or with settings that it has not.
    """
    kind = record.get("type")
    if kind == "classification" and record.get("pool") in ("cls", "cls_and_patches"):
        return ClassHead(dim, num_classes, record["pool"])
    raise ValueError(f"this version knows no head of type {kind!r:.40} with these settings")
