"""Flat shards: the ceil(N/W) consecutive elements of a flattened parameter that one of W workers holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """`data` (n,) is this worker's part, starting at `offset`, of a flattened parameter of `numel` elements."""

    name: str
    data: Tensor
    offset: int
    numel: int
    shape: torch.Size


def cut(name: str, padded: Tensor, numel: int, shape: torch.Size) -> Shard:
    """This worker's shard from its padded ceil(N/W) elements."""
    size = -(-numel // dist.get_world_size())
    offset = min(dist.get_rank() * size, numel)
    return Shard(name, padded[: min(size, numel - offset)], offset, numel, shape)


def cut_whole(name: str, tensor: Tensor) -> Shard:
    """This worker's shard of a tensor that every worker holds whole; a view of it."""
    size = -(-tensor.numel() // dist.get_world_size())
    return cut(name, tensor.detach().flatten()[dist.get_rank() * size :], tensor.numel(), tensor.shape)


def gather(part: Tensor, numel: int) -> Tensor:
    """All workers' unpadded parts of a flat tensor of `numel` elements, joined on every worker."""
    world = dist.get_world_size()
    size = -(-numel // world)
    padded = torch.zeros(size, dtype=part.dtype, device=part.device)
    padded[: part.numel()] = part
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:numel]
