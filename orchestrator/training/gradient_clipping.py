"""Gradient clipping by submodule, whole or partitioned (DINOv3: norm 30 for the backbone and each head).

DeepSpeed clips by the norm of the whole gradient: a spike in one head would then shrink the step of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Clipper:
    """Scales each submodule's gradient down to a largest norm, between the backward passes and the update.

    A submodule is a direct child of the trainable module (`backbone`, `dino_head`, …), or a parameter of its own.

    Args:
        submodules: the one of each parameter group.
        max_norm: the largest norm; None clips nothing.
    """

    def __init__(self, submodules: Sequence[str], max_norm: float | None) -> None:
        self.names = sorted(set(submodules))
        self._indices = [self.names.index(name) for name in submodules]
        self.max_norm = math.inf if max_norm is None else max_norm

    def clip(
        self, gradients: Sequence[Sequence[Tensor]], scale: float, *, sharded: bool = False
    ) -> dict[str, float]:
        """Multiply by `scale`, then clip; returns each submodule's norm between the two, equal on all workers.

        Nothing is clipped if a norm is not finite. Collective if sharded.

        Args:
            gradients: the parts of each parameter group's gradient, changed in place.
            scale: a factor.
            sharded: each worker has parts of its own; else all have the same.
        """
        squares: Tensor | None = None
        for index, parts in zip(self._indices, gradients, strict=True):
            for gradient in parts:
                if squares is None:
                    squares = torch.zeros(len(self.names), dtype=torch.float64, device=gradient.device)
                gradient.mul_(scale)
                squares[index] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        assert squares is not None
        if sharded and dist.get_world_size() > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt().tolist()
        finite = all(map(math.isfinite, norms))
        for index, parts in zip(self._indices, gradients, strict=True):
            if finite and norms[index] > self.max_norm:
                # Norms are sums, whose last bits depend on the number of workers; this factor's do not, once rounded.
                factor = float(np.float32(self.max_norm / norms[index]))
                for gradient in parts:
                    gradient.mul_(factor)
        return dict(zip(self.names, norms, strict=True))


def submodule(name: str) -> str:
    """The direct child of the trainable module that a parameter belongs to."""
    return name.partition(".")[0]
