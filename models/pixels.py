"""From pixels to what towers take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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


def set_stats(tower: nn.Module, mean: Any, std: Any) -> None:
    """Say what a tower's pixels are normalised with: three numbers each, or None for ImageNet's.

    Raises:
        ValueError: they are something else, as a file from anywhere may have it.
    """
    stats = PixelStats(_channels("mean", mean or MEAN), _channels("std", std or STD))
    if min(stats.std) <= 0:
        raise ValueError(f"std is {list(stats.std)}; it is above 0")
    setattr(tower, _STATS, stats)


def _channels(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 3:
        raise ValueError(f"{name} is {values!r:.80}; it is a list of three numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {values!r:.80}; it is a list of three numbers")
    return tuple(values)
