"""What a training stage leaves of a model for those who only use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator.config.pixels import PixelFormat
from orchestrator.models import save_pretrained, set_stats
from orchestrator.training.export import load_export


def save_backbone(
    export: Path,
    model: str,
    folder: Path,
    image_size: int,
    overrides: Mapping[str, Any] | None = None,
    pixels: PixelFormat | None = None,
) -> None:
    """The backbone of an export as a folder that `orchestrator.models.load_pretrained` reads."""
    weights = load_export(export, "backbone.")
    told = None if pixels is None else pixels.record()
    save_pretrained(folder, weights, model, {"image_size": image_size}, overrides, told)


def finish_backbone(
    model: str,
    image_size: int,
    overrides: Mapping[str, Any],
    pixels: PixelFormat | None,
    export: Path,
    folder: Path,
) -> None:
    """As :func:`save_backbone`, in `folder/model`; with its first arguments bound it is a job's `finish`."""
    save_backbone(export, model, folder / "model", image_size, overrides, pixels)


def see_pixels(tower: nn.Module, pixels: PixelFormat | None) -> None:
    """Have a tower normalise its input as the photographs' `pixels` say; without them with ImageNet's values."""
    if pixels is not None:
        set_stats(tower, pixels.mean, pixels.std)
