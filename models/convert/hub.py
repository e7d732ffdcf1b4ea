"""What the torch-hub layout stores besides weights: the mask of the qkv bias, RoPE periods, a norm's second name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..configs import Config, ViTConfig

_MASK = ".bias_mask"
_PERIODS = "rope_embed.periods"
# Periods may have been kept in bfloat16, whose steps are 0.8 % wide.
_TOLERANCE = 0.01


def extras(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that belong to `weights`, which are in the hub's layout."""
    if not isinstance(config, ViTConfig):
        return {f"norms.3.{kind}": weights[f"norm.{kind}"].clone() for kind in ("weight", "bias")}
    out = {_PERIODS: _periods(config.rope_base, config.dim // config.num_heads // 4)}
    for name, tensor in weights.items():
        if name.endswith("qkv.bias") and not config.key_bias:
            mask = torch.ones_like(tensor)
            mask.view(3, -1)[1] = 0
            out[name.removesuffix(".bias") + _MASK] = mask
    return out


def without_extras(
    state: Mapping[str, Tensor], known: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights alone, each qkv bias as its mask leaves it, and `known` with what the periods tell.

    Raises:
        ValueError: the periods follow no base.
    """
    weights = {
        name: tensor for name, tensor in state.items() if name != _PERIODS and not name.endswith(_MASK)
    }
    for name, mask in state.items():
        bias = weights.get(name.removesuffix(_MASK) + ".bias") if name.endswith(_MASK) else None
        if bias is not None:
            # A masked entry may be anything, NaN too.
            weights[name.removesuffix(_MASK) + ".bias"] = torch.where(mask == 0, 0, bias * mask).to(
                bias.dtype
            )
    told = _told_by(state[_PERIODS], state, known) if _PERIODS in state else {}
    return weights, dict(known) | told


def _told_by(periods_K: Tensor, state: Mapping[str, Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Number of heads and base of the rotary embedding; period k is base^(k / K), K = head_dim / 4."""
    periods_K = periods_K.double().cpu()
    num = len(periods_K)
    base = float(known.get("rope_base", ViTConfig.rope_base))
    if num > 1 and not _agree(periods_K, base):
        base = float(f"{periods_K[-1].item() ** (num / (num - 1)):.3g}")
    if not _agree(periods_K, base):
        raise ValueError(f"{_PERIODS} are {periods_K[:4].tolist()} …: no base gives them")
    told: dict[str, Any] = {"rope_base": base}
    if "cls_token" in state:
        told["num_heads"] = state["cls_token"].shape[-1] // (4 * num)
    return told


def _agree(periods_K: Tensor, base: float) -> bool:
    return torch.allclose(periods_K, _periods(base, len(periods_K)).double(), rtol=_TOLERANCE, atol=0)


def _periods(base: float, num: int) -> Tensor:
    return torch.tensor([base ** (k / num) for k in range(num)], dtype=torch.float32)
