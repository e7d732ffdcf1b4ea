"""Gradient clipping by submodule, on ZeRO's partitioned gradients (DINOv3: norm 30 for the backbone and each head).

DeepSpeed clips by the norm of the whole gradient: a spike in one head would then shrink the step of the backbone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class Clipper:
    """Scales each submodule's gradient down to a largest norm, between the backward passes and the update.

    A submodule is a direct child of the trainable module (`backbone`, `dino_head`, …), or a parameter of its own.

    Args:
        zero: DeepSpeed's optimiser, of ZeRO 1, 2 or 3. Each of its groups must lie in one submodule.
        names: parameters by name, as the trainable module has them.
        max_norm: the largest norm.
    """

    def __init__(self, zero: Any, names: Mapping[str, Tensor], max_norm: float) -> None:
        self.zero, self.max_norm = zero, max_norm
        name_of = {id(param): name for name, param in names.items()}
        groups = zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.bit16_groups
        homes = [{submodule(name_of[id(param)]) for param in group} for group in groups]
        assert all(len(home) == 1 for home in homes), homes
        self.names = sorted(set().union(*homes))
        self.slots = [self.names.index(home.pop()) for home in homes]

    def clip(self, scale: float) -> dict[str, float]:
        """Multiply by `scale`, then clip; returns each submodule's norm between the two, equal on all workers.

        Nothing is clipped if a norm is not finite. Collective.
        """
        squares: Tensor | None = None
        for index, slot in enumerate(self.slots):
            for gradient in self.zero.averaged_gradients[index]:
                if squares is None:
                    squares = torch.zeros(len(self.names), dtype=torch.float64, device=gradient.device)
                gradient.mul_(scale)
                squares[slot] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        assert squares is not None
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)
        norms = squares.sqrt().tolist()
        finite = all(map(math.isfinite, norms))
        for index, slot in enumerate(self.slots):
            if finite and norms[slot] > self.max_norm:
                # Norms are sums, whose last bits depend on the number of workers; this factor's do not, once rounded.
                factor = float(np.float32(self.max_norm / norms[slot]))
                for gradient in self.zero.averaged_gradients[index]:
                    gradient.mul_(factor)
        return dict(zip(self.names, norms, strict=True))

    def spoil(self) -> list[Tensor]:
        """Make the whole gradient NaN, which DeepSpeed never applies, whatever the precision and ZeRO stage.

        Returns:
            What is NaN now. ZeRO-3 uses that memory again and never writes to its padding, so it is to be zeroed.
        """
        spoilt = [one for index in range(len(self.slots)) for one in self.zero.averaged_gradients[index]]
        for gradient in spoilt:
            gradient.fill_(math.nan)
        return spoilt


def submodule(name: str) -> str:
    """The direct child of the trainable module that a parameter belongs to."""
    return name.partition(".")[0]
