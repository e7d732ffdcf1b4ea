"""Named towers: the published family (arXiv 2508.10104, section 5) and small ones for one machine."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from .convnext import ConvNeXt, ConvNeXtConfig
from .vit import VisionTransformer, ViTConfig

Config = ViTConfig | ConvNeXtConfig
Backbone = VisionTransformer | ConvNeXt

PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "vit_s": ViTConfig(dim=384, depth=12, num_heads=6),
        "vit_s_plus": ViTConfig(dim=384, depth=12, num_heads=6, ffn="swiglu", ffn_hidden=1536),
        "vit_b": ViTConfig(dim=768, depth=12, num_heads=12),
        "vit_l": ViTConfig(dim=1024, depth=24, num_heads=16),
        "vit_h_plus": ViTConfig(dim=1280, depth=32, num_heads=20, ffn="swiglu", ffn_hidden=5120),
        "vit_7b": ViTConfig(
            dim=4096,
            depth=40,
            num_heads=32,
            ffn="swiglu",
            ffn_hidden=8192,
            qkv_bias=False,
            separate_local_norm=True,
        ),
        "convnext_t": ConvNeXtConfig((3, 3, 9, 3), (96, 192, 384, 768)),
        "convnext_s": ConvNeXtConfig((3, 3, 27, 3), (96, 192, 384, 768)),
        "convnext_b": ConvNeXtConfig((3, 3, 27, 3), (128, 256, 512, 1024)),
        "convnext_l": ConvNeXtConfig((3, 3, 27, 3), (192, 384, 768, 1536)),
        # For a laptop's runs of tens of steps: at the paper's LayerScale of 1e-5 the blocks would hardly
        # take part before a thousand.
        "vit_micro": ViTConfig(patch_size=8, dim=192, depth=6, num_heads=3, layer_scale_init=0.1),
        "vit_nano": ViTConfig(patch_size=8, dim=128, depth=6, num_heads=2, layer_scale_init=0.1),
        "vit_pico": ViTConfig(patch_size=8, dim=96, depth=4, num_heads=2, layer_scale_init=0.1),
        "vit_femto": ViTConfig(patch_size=8, dim=48, depth=2, num_heads=2, layer_scale_init=0.1),
        "convnext_mini": ConvNeXtConfig((1, 1, 3, 1), (24, 48, 96, 192), stem_stride=2, layer_scale_init=0.1),
    }
)


def preset(name: str, **overrides: Any) -> Config:
    """The config called `name`, with fields replaced.

    Raises:
        ValueError: unknown name or field (the nearest ones are listed), or fields that do not fit together.
    """
    if name not in PRESETS:
        nearest = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise ValueError(f"unknown model {name!r}; did you mean {' or '.join(nearest)}?")
    config = PRESETS[name]
    known = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or known
            raise ValueError(f"model {name!r} has no setting {key!r}; did you mean {', '.join(nearest)}?")
    return dataclasses.replace(config, **overrides)


def from_config(config: Config) -> Backbone:
    """The tower of a config, freshly initialised from torch's global generator."""
    return VisionTransformer(config) if isinstance(config, ViTConfig) else ConvNeXt(config)


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
