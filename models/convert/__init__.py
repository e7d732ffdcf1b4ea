"""Weights in the layouts of transformers, timm and torch hub: to ours and back, as state dicts or files."""

from __future__ import annotations

from .files import DamagedWeightsError, config_of, load_any, read_weights, save_as
from .layouts import PositionsError, from_layout, to_layout
from .names import LAYOUTS
from .packages import from_timm, from_transformers
from .timm_config import timm_config
from .transformers_config import known_from_transformers, transformers_config

__all__ = [
    "LAYOUTS",
    "DamagedWeightsError",
    "PositionsError",
    "config_of",
    "from_layout",
    "from_timm",
    "from_transformers",
    "known_from_transformers",
    "load_any",
    "read_weights",
    "save_as",
    "timm_config",
    "to_layout",
    "transformers_config",
]
