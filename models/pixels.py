"""From pixels to what towers take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class PixelStats(NamedTuple):
    """What a tower's pixels are normalised with, a value a channel, on a scale where white is 1."""

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


IMAGENET = PixelStats()
_STATS = "_pixel_stats"


def white_of(images: Tensor) -> int:
    """The value of white: 255 in uint8, 65535 in uint16."""
    return 65535 if images.dtype == torch.uint16 else 255


def normalise(images_BCHW: Tensor, tower: nn.Module | None = None) -> Tensor:
    """Pixels → fp32, minus the tower's mean and divided by its standard deviation.

    Args:
        images_BCHW: uint8 or uint16 (…, 3, H, W), black 0 and white the largest value.
        tower: which sees them; None, and one that nothing else is known of, has ImageNet's.
    """
    stats = IMAGENET if tower is None else stats_of(tower)
    mean = torch.tensor(stats.mean, device=images_BCHW.device)[:, None, None]
    std = torch.tensor(stats.std, device=images_BCHW.device)[:, None, None]
    return (images_BCHW.float() / white_of(images_BCHW) - mean) / std


def stats_of(tower: nn.Module) -> PixelStats:
    """What a tower's pixels are normalised with."""
    found: PixelStats = getattr(tower, _STATS, IMAGENET)
    return found


def set_stats(tower: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Say what a tower's pixels are normalised with; None is ImageNet's."""
    setattr(tower, _STATS, PixelStats(tuple(mean or MEAN), tuple(std or STD)))
