"""Weights out of a job: one safetensors file of whole fp32 tensors, visible only when complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from orchestrator.elastic.engine import Engine


def export_ema(engine: Engine, path: Path, step: int) -> None:
    """Write the EMA (the weights, where a job keeps none) after `step` updates; collective."""
    from safetensors.torch import save_file

    state = engine.full_ema()
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in state.items()}, draft, {"step": str(step)})
        draft.replace(path)
    dist.barrier()


def load_export(path: Path, prefix: str = "") -> Mapping[str, Tensor]:
    """The tensors of an export below `prefix`, with the prefix removed."""
    from safetensors.torch import load_file

    return {
        name.removeprefix(prefix): value for name, value in load_file(path).items() if name.startswith(prefix)
    }
