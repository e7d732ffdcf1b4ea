"""From pixels to what towers take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .configs import RGB

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


FIRST_LAYERS = ("patch_embed.weight", "downsamples.0.0.weight")
"""The names of the weights of a tower that see pixels: (D, C, height, width)."""


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
        images_BCHW: uint8 or uint16 (…, C, H, W), black 0 and white the largest value.
        tower: which sees them; None, and one that nothing else is known of, has ImageNet's.

    Raises:
        ValueError: the images have another number of channels.
    """
    stats = IMAGENET if tower is None else stats_of(tower)
    if images_BCHW.shape[-3] != len(stats.mean):
        raise ValueError(
            f"images have {images_BCHW.shape[-3]} channels, and the model sees {len(stats.mean)}"
        )
    mean = torch.tensor(stats.mean, device=images_BCHW.device)[:, None, None]
    std = torch.tensor(stats.std, device=images_BCHW.device)[:, None, None]
    return (images_BCHW.float() / white_of(images_BCHW) - mean) / std


def stats_of(tower: nn.Module) -> PixelStats:
    """What a tower's pixels are normalised with."""
    found: PixelStats = getattr(tower, _STATS, IMAGENET)
    return found


def set_stats(tower: nn.Module, mean: Any, std: Any) -> None:
    """Say what a tower's pixels are normalised with: a number for each channel, or None for ImageNet's.

    Raises:
        ValueError: they are something else, as a file from anywhere may have it.
    """
    num = num_channels_of(tower)
    stats = PixelStats(_channels("mean", mean or MEAN, num), _channels("std", std or STD, num))
    if min(stats.std) <= 0:
        raise ValueError(f"std is {list(stats.std)}; it must be above 0")
    setattr(tower, _STATS, stats)


def num_channels_of(tower: nn.Module) -> int:
    """The number of channels of the images that a tower takes."""
    found = getattr(getattr(tower, "config", tower), "num_channels", RGB)
    return found if isinstance(found, int) else RGB


def widened(weight_OCHW: Tensor, num_channels: int) -> Tensor:
    """A first layer for more channels, or fewer: its input channels repeated, and scaled by C / `num_channels`.

    As timm does it (`adapt_input_conv`): of channels that all have the same values, it gives what it gave before.
    """
    channels = weight_OCHW.shape[1]
    repeated = weight_OCHW.float().repeat(1, -(-num_channels // channels), 1, 1)[:, :num_channels]
    return (repeated * (channels / num_channels)).to(weight_OCHW.dtype)


def _channels(name: str, values: Any, num: int) -> tuple[float, ...]:
    wanted = f"it must be a list of {num} numbers, one for each channel"
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num:
        raise ValueError(f"{name} is {values!r:.80}; {wanted}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is {values!r:.80}; {wanted}")
    return tuple(values)
