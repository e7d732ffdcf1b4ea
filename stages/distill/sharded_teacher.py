"""A teacher that is larger than one device: its weights over several, its outputs the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.data.blocks import Block
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.step_views import StepViews
from orchestrator.stages.distill.task import FrozenTeacher
from orchestrator.teacher_service import sharding


class ShardedTeacher(FrozenTeacher):
    """A :class:`FrozenTeacher` over the process group that this process has joined.

    Rank r of W forwards blocks r, r + W, …; where W does not divide them, a block is forwarded once more to no
    purpose, since gathering weights takes everybody. Rank 0 collects the codes and computes the scalings.
    """

    def __init__(
        self, config: Distill, recipe: ModelRecipe, teacher: Path, make_views: Callable[[], StepViews]
    ) -> None:
        super().__init__(config, recipe, teacher, make_views)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._prototypes = {
            name: getattr(self._net, f"{name}_head").prototypes.weight.detach().clone()
            for name in ("dino", "ibot")
            if self._rank == 0
        }
        self._engine = sharding.sharded(self._net, "bf16" if self._half else "fp32")

    def __call__(self, step: int) -> dict[str, dict[str, NDArray[Any]]]:
        """The parts of a step, on rank 0, while the others :meth:`follow`."""
        sharding.broadcast_step(step)
        return super().__call__(step)

    @torch.inference_mode()
    def follow(self) -> None:
        """Do this process's part of each step that rank 0 is at, until it ends."""
        while (step := sharding.broadcast_step(None)) is not None:
            for turn in range(self._turns):
                index = turn * self._world + self._rank
                out = self._forward(self._views.block(step, min(index, self._views.num_blocks - 1)))
                if index < self._views.num_blocks:
                    sharding.to_first(out, (), self._rank)

    def close(self) -> None:
        """End the others."""
        sharding.broadcast_step(None)

    @property
    def _turns(self) -> int:
        return -(-self._views.num_blocks // self._world)

    def _forwards(self, blocks: list[Block]) -> list[dict[str, Tensor]]:
        outs: list[dict[str, Tensor]] = []
        for turn in range(self._turns):
            group = blocks[turn * self._world : (turn + 1) * self._world]
            outs.append(self._forward(group[0]))
            for source, block in enumerate(group[1:], 1):
                outs.append(sharding.to_first(None, self._shapes(block), source))
                self.images_forwarded += len(block.ids)
        return [{name: out[name].to(self._device) for name in out} for out in outs]

    def _shapes(self, block: Block) -> tuple[tuple[str, tuple[int, int], torch.dtype], ...]:
        """Of another process's outputs for a block."""
        heads = self._recipe.heads
        views, images = block.arrays["masks"].shape[:2]
        masked = int(block.arrays["masks"].sum())
        return (
            ("dino", (views * images, heads.dino_bottleneck), torch.float32),
            ("ibot", (masked, heads.ibot_bottleneck), torch.float32),
        )
