"""The processes that hold one teacher together where one device is too small for it: a group on one node.

Its weights are sharded by ZeRO-3, its blocks are shared out; rank 0 answers for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore

from orchestrator.training.process_group import join as join_group
from orchestrator.training.zero import zero_config

# A teacher that is ahead waits for its students as long as they take; who is dead is for the driver to see.
_NO_TIMEOUT = timedelta(days=30)
_HOST = "127.0.0.1"
_END = -1


def listen(world: int) -> TCPStore:
    """Where the others meet rank 0; its `port` is one that is free."""
    return TCPStore(_HOST, 0, world, is_master=True, timeout=_NO_TIMEOUT, wait_for_workers=False)


def join(rank: int, world: int, port: int, store: TCPStore | None = None) -> None:
    """Make this process one of the group; `store` is rank 0's own."""
    store = store or TCPStore(_HOST, port, world, is_master=False, timeout=_NO_TIMEOUT)
    # Step numbers and codes travel on the CPU, weights between GPUs.
    join_group(store, rank, world, _NO_TIMEOUT, cpu_tensors=True)


def broadcast_step(step: int | None) -> int | None:
    """The step that rank 0 is at, to all; None: there are no more. The others' argument does not matter."""
    told = torch.tensor([_END if step is None else step])
    dist.broadcast(told, 0)
    return None if int(told) == _END else int(told)


def sharded(module: nn.Module, precision: str) -> Any:
    """The module as a callable whose parameters are spread over the group; each call gathers them layer by layer."""
    import deepspeed

    module.requires_grad_(False).eval()
    num_weights = sum(param.numel() for param in module.parameters())
    config = zero_config(3, precision, 1, num_weights)
    del config["data_types"]
    engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    engine.eval()
    return engine


def to_first(
    tensors: Mapping[str, Tensor] | None,
    shapes: Sequence[tuple[str, Sequence[int], torch.dtype]],
    source: int,
) -> dict[str, Tensor]:
    """Tensors of rank `source`, on the CPU, at rank 0; called by both.

    Args:
        tensors: at `source`, what to send.
        shapes: at rank 0, name, shape and type of each, in the order of `tensors`.
        source: who has them; not 0.
    """
    if tensors is not None:
        for tensor in tensors.values():
            dist.send(tensor.cpu().contiguous(), 0)
        return {}
    found = {}
    for name, shape, dtype in shapes:
        found[name] = torch.empty(tuple(shape), dtype=dtype)
        dist.recv(found[name], source)
    return found
