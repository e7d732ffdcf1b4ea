"""Named towers: the published family (arXiv 2508.10104, section 5) and small ones for one machine. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orchestrator.registrations import registered

from .configs import Config, ConvNeXtConfig, ViTConfig

_log = logging.getLogger("orchestrator")

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


GROUP = "orchestrator.models"
"""Where users' packages say which shapes they bring: entry points of configs, each below the name of its model."""


def all_presets() -> dict[str, Config]:
    """Every model by name: those above, then those of installed packages, but for broken ones."""
    found = dict(PRESETS)
    for name in sorted(_offers()):
        try:
            found[name] = _named(name)
        except ValueError as error:
            _log.warning("a model is left out: %s", error)
    return found


def preset(name: str, **overrides: Any) -> Config:
    """The config called `name`, with fields replaced.

    Raises:
        ValueError: unknown name or field (the nearest ones are listed), a value of another type, or fields that do
            not fit together.
    """
    config = _named(name)
    known = [field.name for field in dataclasses.fields(config)]
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.4) or known
            raise ValueError(f"model {name!r} has no setting {key!r}; did you mean {', '.join(nearest)}?")
    for key, value in overrides.items():
        # Python's booleans are integers, which pydantic goes by.
        of_numbers = not isinstance(getattr(config, key), (bool, str))
        items = value if isinstance(value, (list, tuple)) else [value]
        if of_numbers and any(isinstance(item, bool) for item in items):
            raise ValueError(f"{key} is {value!r}; it must be a number, not true or false")
    if not overrides:
        return config
    values = {field: getattr(config, field) for field in known} | overrides
    checked: TypeAdapter[Config] = TypeAdapter(type(config))
    try:
        return checked.validate_python(values)
    except ValidationError as error:
        raise ValueError(_first(error)) from None


def described(config: Config) -> tuple[str, dict[str, Any]]:
    """A shape as a pipeline file says it: the nearest preset of its kind, and the fields that differ from that one's.

    `drop_path` is none of them: it is training's. Raises ValueError if no preset is of the config's class.
    """
    ours = type(config) in (ViTConfig, ConvNeXtConfig)
    presets = PRESETS if ours else all_presets()
    kinds = {name: one for name, one in presets.items() if type(one) is type(config)}
    if not kinds:
        raise ValueError(f"no model has the shape {type(config).__name__}: is its package installed?")
    differing = {name: _differences(one, config) for name, one in kinds.items()}
    nearest = min(differing, key=lambda name: len(differing[name]))
    return nearest, differing[nearest]


def _differences(preset: Config, config: Config) -> dict[str, Any]:
    """The fields in which `config` differs from a preset, with its values."""
    names = (field.name for field in dataclasses.fields(config) if field.name != "drop_path")
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(preset, name)}


def _named(name: str) -> Config:
    """Ours, or that of an installed package. A name may come out of a model folder, so it is never an import path."""
    if name in PRESETS:
        return PRESETS[name]
    paths = _offers().get(name, ())
    if not paths:
        known = [*PRESETS, *_offers()]
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise ValueError(f"unknown model {name!r}; did you mean {' or '.join(nearest)}?")
    if len(paths) > 1:
        raise ValueError(f"two packages have the model {name!r}: {' and '.join(paths)}; remove one of them")
    module, _, attribute = paths[0].partition(":")
    try:
        config = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise ValueError(
            f"the model {name!r} ({paths[0]}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, (ViTConfig, ConvNeXtConfig)):
        raise ValueError(
            f"the model {name!r} ({paths[0]}) is {type(config).__name__}; it must be a ViTConfig or a ConvNeXtConfig"
        )
    return config


def _offers() -> dict[str, tuple[str, ...]]:
    """The import paths by name of models of installed packages, and of those that were registered; imports none."""
    return _found(registered("models"))


@cache
def _found(by_call: tuple[tuple[str, str], ...]) -> dict[str, tuple[str, ...]]:
    offers = [(entry.name, entry.value.replace(" ", "")) for entry in entry_points(group=GROUP)]
    found: dict[str, tuple[str, ...]] = {}
    for name, path in (*offers, *by_call):
        found[name] = tuple(dict.fromkeys((*found.get(name, ()), path)))
    return found


def _first(error: ValidationError) -> str:
    """The first error, in our words."""
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    said = (
        first["msg"]
        .replace("Input should be a valid", "it must be a")
        .replace("Input should be", "it must be")
    )
    return f"{'.'.join(map(str, first['loc']))} is {first['input']!r}; {said}"
