"""Making this process one of a group that computes together: torch.distributed, and DeepSpeed on top of it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.training.device import CPU, device
from orchestrator.training.zero import import_deepspeed


def join(
    store: Any, rank: int, world: int, timeout: timedelta | None = None, *, cpu_tensors: bool = False
) -> None:
    """Join the default process group; returns once all are there.

    Args:
        store: the key-value store in which the processes meet.
        rank: of this process.
        world: how many there are.
        timeout: of the meeting and of each collective; torch's own if None.
        cpu_tensors: whether tensors on the CPU are exchanged too, where the group is one of GPUs.
    """
    gpu = device() != CPU
    if gpu:
        torch.cuda.set_device(0)  # each process sees its own GPU only
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
        os.environ[name] = str(value)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu and cpu_tensors else backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    import_deepspeed().init_distributed(backend, dist_init_required=False, verbose=False)
