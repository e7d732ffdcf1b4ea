"""Which layout a state dict has, and the config of the tower it belongs to, from names and shapes."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..configs import Config, ConvNeXtConfig, ViTConfig
from ..presets import PRESETS
from .names import LAYOUTS, block_pattern, respelled, rows

State = Mapping[str, Tensor]

# One block of each kind: all names that occur, with 0 for every index.
_SAMPLES: tuple[Config, ...] = (
    ViTConfig(depth=1, ffn="mlp", separate_local_norm=True),
    ViTConfig(depth=1, ffn="swiglu", key_bias=True),
    ConvNeXtConfig(depths=(1, 1, 1, 1)),
)


def detect(state: Iterable[str]) -> str:
    """The layout whose names these are.

    Raises:
        ValueError: less than half of the names belong to any layout.
    """
    names = list(state)
    shares = {layout: _share(names, layout) for layout in LAYOUTS}
    best = max(shares, key=lambda layout: shares[layout])
    if shares[best] < 0.5:
        raise ValueError(f"names of no known layout ({', '.join(LAYOUTS)}): {', '.join(names[:5])} …")
    return best


def infer_config(state: State, layout: str, known: Mapping[str, Any]) -> Config:
    """The config of a tower whose weights have these names and shapes, with the fields of `known`.

    What neither shows is that of the preset of the same widths and depths.

    Raises:
        ValueError: a weight that shows the shape is missing, the number of heads is not known, or unknown fields.
    """
    family = "convnext" if _is_convnext(state, layout) else "vit"
    found = _convnext_fields(state, layout) if family == "convnext" else _vit_fields(state, layout)
    kind = ConvNeXtConfig if family == "convnext" else ViTConfig
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in known:
        if name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.4) or sorted(fields)
            raise ValueError(f"a {family} has no setting {name!r}; did you mean {', '.join(nearest)}?")
    told = found | dict(known)  # what contradicts the weights is reported as misshapen
    return dataclasses.replace(_nearest_preset(kind, told), **told)


def _share(names: list[str], layout: str) -> float:
    """How many of the names occur in the layout, whatever their indices."""
    known = {_anonymous(name) for config in _SAMPLES for row in rows(config, layout) for name in row.theirs}
    return sum(_anonymous(respelled(name, layout)) in known for name in names) / max(1, len(names))


def _anonymous(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _is_convnext(state: State, layout: str) -> bool:
    pattern = block_pattern("convnext", layout)
    return any(pattern.match(name) for name in state)


def _vit_fields(state: State, layout: str) -> dict[str, Any]:
    depth = 1 + max((index for (index,) in _indices(state, "vit", layout)), default=0)
    gated = ViTConfig(depth=depth, ffn="swiglu", separate_local_norm=True)
    is_gated = _Shapes(state, layout, gated).has("blocks.0.ffn.gate.weight")
    shape = _Shapes(state, layout, gated if is_gated else dataclasses.replace(gated, ffn="mlp"))
    dim = shape.of("cls_token")[-1]
    hidden = shape.of("blocks.0.ffn.down.weight")[1]
    return {
        "patch_size": shape.of("patch_embed.weight")[-1],
        "num_channels": shape.of("patch_embed.weight")[1],
        "dim": dim,
        "depth": depth,
        "ffn": "swiglu" if is_gated else "mlp",
        "ffn_hidden": None if hidden == 4 * dim and not is_gated else hidden,
        "num_storage_tokens": shape.of("storage_tokens")[1] if shape.has("storage_tokens") else 0,
        "qkv_bias": shape.has("blocks.0.attention.qkv.q_bias"),
        "key_bias": _has_key_bias(state, layout),
        "separate_local_norm": shape.has("local_norm.weight"),
    }


def _has_key_bias(state: State, layout: str) -> bool:
    """Whether keys have a bias; where one tensor is for queries, keys and values, its numbers tell."""
    if layout == "hub":
        biases = [tensor.chunk(3)[1] for name, tensor in state.items() if name.endswith(".qkv.bias")]
        return any(bool(bias.any()) for bias in biases if not bias.is_meta)
    return any(name.endswith((".qkv.k_bias", ".k_proj.bias")) for name in state)


def _convnext_fields(state: State, layout: str) -> dict[str, Any]:
    depths = [0, 0, 0, 0]
    for stage, index in _indices(state, "convnext", layout):
        if stage < len(depths):
            depths[stage] = max(depths[stage], index + 1)
    if not all(depths):
        raise ValueError(f"a ConvNeXt of four stages has blocks in each; here they have {depths}")
    shape = _Shapes(state, layout, ConvNeXtConfig(depths=tuple(depths)))  # type: ignore[arg-type]
    return {
        "depths": tuple(depths),
        "dims": tuple(shape.of(f"stages.{stage}.0.gamma")[0] for stage in range(4)),
        "stem_stride": shape.of("downsamples.0.0.weight")[-1],
        "num_channels": shape.of("downsamples.0.0.weight")[1],
    }


def _indices(state: State, family: str, layout: str) -> set[tuple[int, ...]]:
    pattern = block_pattern(family, layout)
    matches = filter(None, map(pattern.match, state))
    return {tuple(map(int, match.groups())) for match in matches}


class _Shapes:
    """Shapes of another layout's weights by our names."""

    def __init__(self, state: State, layout: str, config: Config) -> None:
        self._state = state
        self._names = {row.ours[0]: row.theirs[0] for row in rows(config, layout) if row.theirs}

    def has(self, ours: str) -> bool:
        return self._names.get(ours) in self._state

    def of(self, ours: str) -> tuple[int, ...]:
        name = self._names[ours]
        if name not in self._state:
            raise ValueError(f"{name} is missing, so the model's shape is not known")
        return tuple(self._state[name].shape)


def _nearest_preset(kind: type[Config], told: Mapping[str, Any]) -> Config:
    """The preset of the same widths and depths, for what weights do not show; else the defaults."""
    decisive = [name for name in ("dim", "depth", "ffn", "ffn_hidden", "depths", "dims") if name in told]
    for config in PRESETS.values():
        if isinstance(config, kind) and all(getattr(config, name) == told[name] for name in decisive):
            return config
    if kind is ViTConfig and "num_heads" not in told:
        raise ValueError(f"no preset is {told['dim']} wide and {told['depth']} deep: set num_heads=")
    return kind()
