"""Weights out of a job: one safetensors file of whole fp32 tensors, visible only when complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from orchestrator.fsio import make_folder, replacing
from orchestrator.training.engine import Engine


def export_ema(engine: Engine, path: Path, step: int) -> None:
    """Write the EMA (the weights, where a job keeps none) after `step` updates; collective."""
    from safetensors.torch import save_file

    state = engine.full_ema()
    if dist.get_rank() == 0:
        whole = {name: value.contiguous() for name, value in state.items()}
        # Durable: `Job.is_done` takes a file of this name for a whole one.
        make_folder(path.parent)
        with replacing(path, only_writer=True) as draft:
            save_file(whole, draft, {"step": str(step)})
    dist.barrier()


def load_export(path: Path, prefix: str = "") -> Mapping[str, Tensor]:
    """The tensors of an export below `prefix`, with the prefix removed."""
    from safetensors.torch import load_file

    return {
        name.removeprefix(prefix): value for name, value in load_file(path).items() if name.startswith(prefix)
    }
