"""State dicts from our names to another layout's and back, by the tables of names.py."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..configs import Config, ViTConfig
from ..towers import from_config
from . import hub
from .infer import detect, infer_config
from .names import IGNORED, LAYOUTS, Row, respelled, rows

State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# What towers with learned positions call them.
_POSITIONS = ("pos_embed", "embeddings.position_embeddings", "embeddings.position_embeddings.weight")


class PositionsError(ValueError):
    """A tower with learned positions, as those of DINO and DINOv2: ours have rotary ones and cannot be built of it."""


def to_layout(state: State, config: Config, layout: str) -> dict[str, Tensor]:
    """A tower's weights under the names and in the shapes of another layout.

    What the layout lacks is left out: timm the mask token; transformers and timm the norm of local crops, which
    only training uses; all of them a ConvNeXt's mask token.

    Args:
        state: a tower's whole state dict, in any dtype, which is kept.
        config: the tower's.
        layout: "transformers", "timm", "hub" (or "ours").

    Raises:
        ValueError: unknown layout, one that has no place for a bias on keys, or the state does not fit the config.
    """
    _check_layout(layout)
    if layout == "timm" and isinstance(config, ViTConfig) and config.key_bias:
        raise ValueError("timm's towers have no bias on keys: write the layout 'hub' or 'transformers'")
    _check(state, _our_shapes(config), "ours")
    out = _renamed(_with_empty(state, config), config, layout)
    return out | (hub.extras(config, out) if layout == "hub" else {})


def from_layout(state: State, layout: str | None = None, **known: Any) -> tuple[Config, dict[str, Tensor]]:
    """Config and weights of a tower from a state dict of any layout.

    Args:
        state: the whole state dict, in any dtype, which is kept. A classifier in it is ignored. A mask token that
            the layout lacks is zero.
        layout: None finds out from the names.
        known: fields of the config that the weights do not show, or that are known from elsewhere. The number of
            heads is needed unless the hub's RoPE periods or a preset of the same shape tell.

    Raises:
        PositionsError: a tower with learned positions.
        ValueError: names of no known layout; missing, surplus or misshapen weights (the nearest names are listed);
            a bias on keys though `known` says there is none; RoPE periods that fit no base; unknown fields in `known`.
    """
    for name in _POSITIONS:
        if name in state:
            raise PositionsError(
                f"{name} {tuple(state[name].shape)} is a learned position embedding, as DINO and DINOv2 have it; the "
                "towers here have rotary positions instead"
            )
    layout = layout or detect(state)
    _check_layout(layout)
    state = _tidied(state, layout)
    if layout == "hub":
        state, known = hub.without_extras(state, known)
    config = infer_config(state, layout, known)
    with torch.device("meta"):
        own = from_config(config).state_dict()
    blank = _with_empty(own, config)
    wanted = _renamed(blank, config, layout)
    _check(state, {name: tuple(tensor.shape) for name, tensor in wanted.items()}, layout)
    out: dict[str, Tensor] = {}
    for row in rows(config, layout):
        out |= _read(row, state, blank)
    return config, {name: out[name] for name in own}


def _with_empty(state: State, config: Config) -> State:
    """Our state with the storage tokens of a tower without any, which some layouts keep as an empty tensor."""
    if not isinstance(config, ViTConfig) or config.num_storage_tokens:
        return state
    return {**state, "storage_tokens": state["cls_token"][:, :0]}


def _renamed(state: State, config: Config, layout: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for row in rows(config, layout):
        out |= _write(row, state)
    return out


def _write(row: Row, state: State) -> dict[str, Tensor]:
    first = state[row.ours[0]]
    if not row.theirs or (row.left_out_empty and first.numel() == 0):
        return {}
    if len(row.ours) == len(row.theirs) == 1:
        return {row.theirs[0]: first[0] if row.squeezed else first}
    whole = torch.cat([torch.zeros_like(first) if name == "0" else state[name] for name in row.ours])
    parts = whole.chunk(len(row.theirs))
    return {name: part.clone() for name, part in zip(row.theirs, parts, strict=True) if name != "0"}


def _read(row: Row, state: State, blank: State) -> dict[str, Tensor]:
    """`blank`: our tower's state on the meta device, for the shapes."""
    first = state.get(row.theirs[0]) if row.theirs else None
    if first is None:
        like = next(iter(state.values()))
        return {name: torch.zeros(blank[name].shape, dtype=like.dtype) for name in row.ours if name != "0"}
    if len(row.ours) == len(row.theirs) == 1:
        return {row.ours[0]: first.reshape(blank[row.ours[0]].shape)}
    whole = torch.cat([torch.zeros_like(first) if name == "0" else state[name] for name in row.theirs])
    parts = whole.chunk(len(row.ours))
    for name, part in zip(row.ours, parts, strict=True):
        if name == "0" and name not in row.theirs and part.any():
            raise ValueError(f"{row.theirs[0]} has a bias on keys: key_bias cannot be false")
    return {name: part.clone() for name, part in zip(row.ours, parts, strict=True) if name != "0"}


def _tidied(state: State, layout: str) -> dict[str, Tensor]:
    """Without what a tower does not need, and in the layout's present spelling."""
    ignored = re.compile(IGNORED.get(layout, r"(?!)"))
    return {respelled(name, layout): tensor for name, tensor in state.items() if not ignored.fullmatch(name)}


def _our_shapes(config: Config) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in from_config(config).state_dict().items()}


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        nearest = difflib.get_close_matches(layout, LAYOUTS, n=1, cutoff=0.4) or LAYOUTS
        raise ValueError(f"unknown layout {layout!r}; did you mean {' or '.join(nearest)}?")


def _check(state: State, wanted: Shapes, layout: str) -> None:
    """Raises ValueError unless names and shapes are those wanted; axes of length 1 do not matter."""
    missing = sorted(wanted.keys() - state.keys())
    surplus = sorted(state.keys() - wanted.keys())
    misshapen = [
        name
        for name in sorted(wanted.keys() & state.keys())
        if _solid(state[name].shape) != _solid(wanted[name])
    ]
    if not (missing or surplus or misshapen):
        return
    problems = [f"{name} is missing" for name in missing[:_LISTED]]
    problems += [f"{name} is surplus{_nearest(name, missing or wanted)}" for name in surplus[:_LISTED]]
    problems += [f"{name} is {tuple(state[name].shape)}, not {wanted[name]}" for name in misshapen[:_LISTED]]
    counts = f"{len(missing)} missing, {len(surplus)} surplus, {len(misshapen)} misshapen"
    raise ValueError(f"the weights do not fit the layout {layout!r} ({counts}): {'; '.join(problems)}")


_LISTED = 5


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""


def _solid(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
