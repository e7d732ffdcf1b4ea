"""Flat shards: the ceil(N/W) consecutive elements of a flattened parameter that one of W workers holds."""

from __future__ import annotations

from collections.abc import Mapping
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


def gather_all(parts: Mapping[str, Tensor], numels: Mapping[str, int]) -> dict[str, Tensor]:
    """As :func:`gather`, of many tensors of one type in one exchange. With one worker they are the parts themselves.

    Args:
        parts: this worker's, by name; all workers have the same names in the same order.
        numels: elements of each whole tensor.
    """
    world = dist.get_world_size()
    if world == 1 or not parts:
        return dict(parts)
    sizes = {name: -(-numels[name] // world) for name in parts}
    first = next(iter(parts.values()))
    padded = torch.zeros(sum(sizes.values()), dtype=first.dtype, device=first.device)
    offset = 0
    for name, part in parts.items():
        padded[offset : offset + part.numel()] = part
        offset += sizes[name]
    rows = torch.empty(world, padded.numel(), dtype=padded.dtype, device=padded.device)
    dist.all_gather(list(rows.unbind()), padded)
    pieces = rows.split(list(sizes.values()), dim=1)
    return {name: piece.flatten()[: numels[name]] for name, piece in zip(sizes, pieces, strict=True)}
