"""Networks from elsewhere, opened, and their input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.config.pixels import PixelFormat
from orchestrator.errors import UserError
from orchestrator.models import white_of
from orchestrator.models.networks import find_callable
from orchestrator.models.wrapped import ForeignNet, open_any, open_module, open_timm, open_transformers
from orchestrator.slow_import import warn_if_slow
from orchestrator.stages.common.network_source import BLOCKS_HINT, NetworkSource


def open_network(source: NetworkSource, size: int, what: str, where: str) -> ForeignNet:
    """A network with its weights, frozen, on the CPU.

    Args:
        source: where it comes from.
        size: pixels a side of what it sees.
        what: it is called in messages.
        where: the section that names it.

    Raises:
        UserError: it is not there, or what it gives is not clear.
    """
    try:
        if source.from_ is not None:
            return open_any(source.from_, size, source.blocks, num_channels=source.num_channels)
        more: dict[str, Any] = {"blocks": source.blocks, "num_channels": source.num_channels}
        if source.timm is not None:
            return open_timm(source.timm, size, kwargs=source.kwargs, **more)
        if source.transformers is not None:
            return open_transformers(source.transformers, size, source.kwargs, **more)
        with warn_if_slow(source.path.partition(":")[0]):
            find_callable(source.path)
        return open_module(source.path, source.weights, size, source.kwargs, **more)
    except ModuleNotFoundError as error:
        raise UserError(str(error), where=where, hint=f"pip install {error.name}") from error
    except (ValueError, FileNotFoundError) as error:
        hint = "set `size` to what it takes, or wrap it in a module that gives cls and patches"
        if source.blocks is not None and "block" in str(error):
            hint = BLOCKS_HINT
        raise UserError(f"{what}: {error}", where=where, hint=hint) from error


def as_seen(
    images_NCHW: Tensor, source: NetworkSource, size: int, pixels: PixelFormat | None = None
) -> Tensor:
    """What a network sees of uint8 or uint16 images: its bands, its size, its mean and deviation.

    Args:
        images_NCHW: the pictures, black 0 and white the largest value.
        source: the network.
        size: pixels a side of what it sees.
        pixels: which bands the channels of the pictures are.

    Raises:
        UserError: see :meth:`NetworkSource.channels`.
    """
    channels = source.channels(pixels)
    white = white_of(images_NCHW)
    x_NCHW = (images_NCHW if channels is None else images_NCHW[:, list(channels)]).float() / white
    if x_NCHW.shape[-2:] != (size, size):
        x_NCHW = F.interpolate(x_NCHW, (size, size), mode="bicubic", align_corners=False, antialias=True)
        x_NCHW = x_NCHW.clamp(0, 1)  # bicubic overshoots
    mean, std = (
        torch.tensor(values, device=x_NCHW.device)[:, None, None] for values in (source.mean, source.std)
    )
    return (x_NCHW - mean) / std
