"""Single-device towers and heads: plain torch modules that know nothing of training or of the engine.

Names load on first use, so that `orchestrator.models.presets`, which has no torch in it, is cheap to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configs import Config, ConvNeXtConfig, ViTConfig
    from .convnext import ConvNeXt
    from .dense import TextAligner
    from .heads import PrototypeHead
    from .presets import PRESETS, preset
    from .pretrained import MEAN, STD, embed, load_pretrained, normalise, preprocess, save_pretrained
    from .text import TextConfig, TextTower
    from .towers import Backbone, build, count_params, from_config, layer_depths
    from .vit import Features, VisionTransformer

_HOMES = {
    "configs": ("Config", "ConvNeXtConfig", "ViTConfig"),
    "convnext": ("ConvNeXt",),
    "dense": ("TextAligner",),
    "heads": ("PrototypeHead",),
    "presets": ("PRESETS", "preset"),
    "pretrained": ("MEAN", "STD", "embed", "load_pretrained", "normalise", "preprocess", "save_pretrained"),
    "text": ("TextConfig", "TextTower"),
    "towers": ("Backbone", "build", "count_params", "from_config", "layer_depths"),
    "vit": ("Features", "VisionTransformer"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
