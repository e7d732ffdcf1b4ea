"""From pixels to what towers take."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(images_BCHW: Tensor) -> Tensor:
    """uint8 (…, 3, H, W) in 0–255 → fp32, minus ImageNet's mean and divided by its standard deviation."""
    mean = torch.tensor(MEAN, device=images_BCHW.device)[:, None, None]
    std = torch.tensor(STD, device=images_BCHW.device)[:, None, None]
    return (images_BCHW.float() / 255 - mean) / std
