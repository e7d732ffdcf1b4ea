"""Building towers from their configs, and what training wants to know of their parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from .configs import Config, ViTConfig
from .convnext import ConvNeXt
from .presets import preset
from .vit import VisionTransformer

Backbone = VisionTransformer | ConvNeXt


def from_config(config: Config) -> Backbone:
    """The tower of a config, freshly initialised from torch's global generator.

    Raises:
        ValueError: a config of a user's package, whose `build` gives no VisionTransformer and no ConvNeXt.
    """
    build = getattr(config, "build", None)
    if build is None:
        return VisionTransformer(config) if isinstance(config, ViTConfig) else ConvNeXt(config)
    model = build()
    if not isinstance(model, (VisionTransformer, ConvNeXt)):
        raise ValueError(
            f"{type(config).__name__}.build gives {type(model).__name__}; derive it from VisionTransformer or ConvNeXt"
        )
    return model


def build(name: str, **overrides: Any) -> Backbone:
    """The tower called `name`, freshly initialised; raises as :func:`preset`."""
    return from_config(preset(name, **overrides))


def layer_depths(model: Backbone) -> dict[str, int]:
    """Depth of every parameter, for layer-wise learning rates.

    Embeddings and tokens are at 0, block i at i + 1 (a ConvNeXt downsampling goes with the block after it),
    the final norm at number of blocks + 1.
    """
    num_blocks = len(model.blocks)
    prefixes = {"patch_embed.": 0, "cls_token": 0, "storage_tokens": 0, "mask_token": 0, "downsamples.0.": 0}
    if isinstance(model, VisionTransformer):
        prefixes |= {f"blocks.{index}.": index + 1 for index in range(num_blocks)}
    else:
        before = 0
        for stage, depth in enumerate(model.config.depths):
            prefixes.setdefault(f"downsamples.{stage}.", before + 1)
            prefixes |= {f"stages.{stage}.{index}.": before + index + 1 for index in range(depth)}
            before += depth
    names = [name for name, _ in model.named_parameters()]
    return {
        name: next((depth for prefix, depth in prefixes.items() if name.startswith(prefix)), num_blocks + 1)
        for name in names
    }


def count_params(model: nn.Module) -> int:
    """Number of parameters (works on the meta device)."""
    return sum(parameter.numel() for parameter in model.parameters())
