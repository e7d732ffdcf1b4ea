"""Flat shards: the ceil(N/W) consecutive elements of a flattened parameter that one of W workers holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of whole tensors that are gathered in one exchange; a larger tensor has one of its own.
_GATHERED_AT_ONCE = 2**22


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


def gather_all(parts: Mapping[str, Tensor], numels: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    """As :func:`gather`, of many tensors of one type, many in one exchange. Collective until it is used up.

    With one worker they are the parts themselves.

    Args:
        parts: this worker's, by name; all workers have the same names in the same order.
        numels: elements of each whole tensor.
    """
    if dist.get_world_size() == 1:
        yield from parts.items()
        return
    group: dict[str, Tensor] = {}
    size = 0
    for name, part in parts.items():
        if group and size + numels[name] > _GATHERED_AT_ONCE:
            yield from _gather_group(group, numels)
            group, size = {}, 0
        group[name] = part
        size += numels[name]
    yield from _gather_group(group, numels)


def _gather_group(parts: Mapping[str, Tensor], numels: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    if not parts:
        return
    world = dist.get_world_size()
    sizes = [-(-numels[name] // world) for name in parts]
    first = next(iter(parts.values()))
    padded = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for part, slot in zip(parts.values(), padded.split(sizes), strict=True):
        slot[: part.numel()] = part
    rows = torch.empty(world, padded.numel(), dtype=padded.dtype, device=padded.device)
    dist.all_gather(list(rows.unbind()), padded)
    for name, columns in zip(parts, rows.split(sizes, dim=1), strict=True):
        yield name, columns.flatten()[: numels[name]]
