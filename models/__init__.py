"""Single-device towers and heads: plain torch modules that know nothing of training or of the engine."""

from __future__ import annotations

from .convnext import ConvNeXt, ConvNeXtConfig
from .dense import TextAligner
from .heads import PrototypeHead
from .presets import PRESETS, Backbone, Config, build, count_params, from_config, layer_depths, preset
from .pretrained import MEAN, STD, embed, load_pretrained, normalise, preprocess, save_pretrained
from .text import TextConfig, TextTower
from .vit import Features, VisionTransformer, ViTConfig

__all__ = [
    "MEAN",
    "PRESETS",
    "STD",
    "Backbone",
    "Config",
    "ConvNeXt",
    "ConvNeXtConfig",
    "Features",
    "PrototypeHead",
    "TextAligner",
    "TextConfig",
    "TextTower",
    "ViTConfig",
    "VisionTransformer",
    "build",
    "count_params",
    "embed",
    "from_config",
    "layer_depths",
    "load_pretrained",
    "normalise",
    "preprocess",
    "preset",
    "save_pretrained",
]
