"""How DeepSpeed is imported and configured."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.training.job import REDUCE_BUCKET


def import_deepspeed() -> Any:
    """DeepSpeed, imported in a third of the time and without compiling anything.

    Its autotuner, of no use here, imports mlflow and pandas if they are installed: 2.5 s of a worker's start.
    And it compiles a shared-memory op on CPUs: a worker killed while it builds leaves a lock on which every
    later start on that machine waits for ever. Only `inference_all_reduce` uses the op, and falls back.
    """
    hidden = sys.modules.get("mlflow", ...)
    if hidden is ...:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if hidden is ...:
            del sys.modules["mlflow"]
    _import_muon()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed


def _import_muon() -> None:
    """ZeRO imports its Muon optimizer with any other; its decorators load the whole compiler, 3 s a worker."""
    compile_ = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compile_


def sum_exactly(zero: Any) -> None:
    """Let a new ZeRO-3 optimizer add gradients up in float64: over blocks and workers, without a mean over workers.

    In float32 the number of workers decides in which order a sum is rounded. A float64 sum of float32 numbers is exact
    as long as they are within a factor of 2^29, and who takes the mean of it afterwards rounds once, always alike.
    DeepSpeed's settings do not know float64 here. Its division by the number of workers is undone beforehand, which
    is exact; a third of a gradient would not be.

    Args:
        zero: a `DeepSpeedZeroOptimizer_Stage3` before its first backward pass.
    """
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    def scatter_sums(params: list[Any], _dtype: torch.dtype) -> list[torch.Tensor]:
        group = zero._get_param_partition_group(params[0])
        world = dist.get_world_size(group)
        sums: list[torch.Tensor] = reduce_scatter_coalesced(
            [p.grad.double().mul_(world) for p in params], group
        )
        return sums

    zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = scatter_sums
    zero.gradient_accumulation_dtype = torch.float64
    zero.grad_partitions_flat_buffer = zero.grad_partitions_flat_buffer.double()
    partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    offset = 0
    for param, partition in partitions.items():
        partitions[param] = zero.grad_partitions_flat_buffer.narrow(0, offset, partition.numel())
        offset += partition.numel()


def zero_config(stage: int, precision: str, blocks_per_worker: int, num_trained: int) -> dict[str, Any]:
    """DeepSpeed's settings.

    Args:
        stage: of ZeRO: 1, 2 or 3. With bf16, 1 is 2: for it DeepSpeed has an optimizer of its own, whose gradients are
            not in the parts that clipping and checkpoints go by. Stage 2 takes less memory, and its workers exchange
            the gradients of each block instead of a step's.
        precision: `fp32` or `bf16`.
        blocks_per_worker: backward passes of a step.
        num_trained: trainable weights of the whole model.
    """
    world = dist.get_world_size()
    if precision == "bf16":
        stage = max(stage, 2)
    config: dict[str, Any] = {
        "train_batch_size": world * blocks_per_worker,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": blocks_per_worker,
        # Clipped by submodule, in `gradient_clipping.py`; left out, DeepSpeed would clip the whole gradient at 1.
        "gradient_clipping": 0.0,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            # In weights. Each worker holds a buffer of that size in fp32, 2 GiB at DeepSpeed's default; several
            # small students may share a GPU.
            "reduce_bucket_size": min(REDUCE_BUCKET, num_trained),
            "contiguous_gradients": True,
            # DeepSpeed's own linear takes a fifth longer a step here, and saves memory only where weights
            # are not fetched again for the backward pass; ours are.
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if stage == 3:
        # Small parameters gain little from staying gathered once whole blocks are fetched as units, and a
        # persistent copy would go stale when a checkpoint or the EMA overwrites its shards.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config
