"""Single-device towers and heads: plain torch modules that know nothing of training or of the engine.

Names load on first use, so that `orchestrator.models.presets`, which has no torch in it, is cheap to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bert import BertEncoder, BertTower, Projection, load_bert
    from .bert_config import BertConfig, read_bert_config
    from .configs import Config, ConvNeXtConfig, ViTConfig
    from .convnext import ConvNeXt
    from .dense import TextAligner
    from .heads import PrototypeHead
    from .pixels import MEAN, STD, normalise, set_stats, stats_of, white_of
    from .presets import PRESETS, preset
    from .pretrained import embed, embed_many, load_pretrained, preprocess, save_pretrained
    from .text import TextConfig, TextTower
    from .towers import Backbone, build, count_params, from_config, layer_depths
    from .vit import BackboneFeatures, VisionTransformer

_HOMES = {
    "bert": ("BertEncoder", "BertTower", "Projection", "load_bert"),
    "bert_config": ("BertConfig", "read_bert_config"),
    "configs": ("Config", "ConvNeXtConfig", "ViTConfig"),
    "convnext": ("ConvNeXt",),
    "dense": ("TextAligner",),
    "heads": ("PrototypeHead",),
    "presets": ("PRESETS", "preset"),
    "pixels": ("MEAN", "STD", "normalise", "set_stats", "stats_of", "white_of"),
    "pretrained": ("embed", "embed_many", "load_pretrained", "preprocess", "save_pretrained"),
    "text": ("TextConfig", "TextTower"),
    "towers": ("Backbone", "build", "count_params", "from_config", "layer_depths"),
    "vit": ("BackboneFeatures", "VisionTransformer"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "MEAN",
    "PRESETS",
    "STD",
    "Backbone",
    "BackboneFeatures",
    "BertConfig",
    "BertEncoder",
    "BertTower",
    "Config",
    "ConvNeXt",
    "ConvNeXtConfig",
    "Projection",
    "PrototypeHead",
    "TextAligner",
    "TextConfig",
    "TextTower",
    "ViTConfig",
    "VisionTransformer",
    "build",
    "count_params",
    "embed",
    "embed_many",
    "from_config",
    "layer_depths",
    "load_bert",
    "load_pretrained",
    "normalise",
    "preprocess",
    "preset",
    "read_bert_config",
    "save_pretrained",
    "set_stats",
    "stats_of",
    "white_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
