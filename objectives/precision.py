"""In which precision objectives compute."""

from __future__ import annotations

import torch
from torch import Tensor


def work_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for what has less, else the tensor's own: float64 stays float64, for checks against formulas."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in its :func:`work_dtype`."""
    return tensor.to(work_dtype(tensor))
