"""This process as a group of one worker, which the training loop asks for."""

from __future__ import annotations

import os


def join_group() -> None:
    """Join a gloo group of one worker on the CPU; nothing happens where a group was joined before."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from orchestrator.training.zero import import_deepspeed

    if dist.is_initialized():
        return
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    import_deepspeed().init_distributed("gloo", dist_init_required=False, verbose=False)
