"""The config.json of transformers' DINOv3 towers, from ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..configs import RGB, Config, ViTConfig

_VIT, _CONVNEXT = "dinov3_vit", "dinov3_convnext"
# Fields of ours that the weights do not show, and their names there.
_HIDDEN = {
    _VIT: {
        "num_heads": "num_attention_heads",
        "norm_eps": "layer_norm_eps",
        "rope_base": "rope_theta",
        "rope_rescale": "pos_embed_rescale",
        "layer_scale_init": "layerscale_value",
    },
    _CONVNEXT: {"norm_eps": "layer_norm_eps", "layer_scale_init": "layer_scale_init_value"},
}


def transformers_config(config: Config) -> dict[str, Any]:
    """Keyword arguments of `DINOv3ViTConfig` or `DINOv3ConvNextConfig`, with the "model_type" of config.json.

    Drop-path is left at 0: it is training's, and drawn otherwise there. `image_size` stays at their default; the
    towers take any.

    Raises:
        ValueError: a ConvNeXt whose stem has another stride than 4, which transformers cannot build.
    """
    kind = _VIT if isinstance(config, ViTConfig) else _CONVNEXT
    hidden = {theirs: getattr(config, ours) for ours, theirs in _HIDDEN[kind].items()}
    if not isinstance(config, ViTConfig):
        if config.stem_stride != 4:
            raise ValueError(f"stem_stride is {config.stem_stride}; transformers' DINOv3ConvNext has 4 only")
        shown: dict[str, Any] = {"depths": list(config.depths), "hidden_sizes": list(config.dims)}
        return {"model_type": kind} | shown | hidden | {"hidden_act": "gelu"} | _channels(config)
    shown = {
        "patch_size": config.patch_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.ffn_hidden or 4 * config.dim,
        "num_register_tokens": config.num_storage_tokens,
        "use_gated_mlp": config.ffn == "swiglu",
        "hidden_act": "silu" if config.ffn == "swiglu" else "gelu",
        "query_bias": config.qkv_bias,
        "key_bias": config.key_bias,
        "value_bias": config.qkv_bias,
    }
    return {"model_type": kind} | shown | hidden | _channels(config)


def _channels(config: Config) -> dict[str, Any]:
    return {} if config.num_channels == RGB else {"num_channels": config.num_channels}


def known_from_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a transformers config.json says of a tower beyond its weights: `known` for `from_layout`.

    Raises:
        ValueError: no DINOv3 tower, or one with another activation than ours.
    """
    kind = values.get("model_type")
    if kind not in _HIDDEN:
        raise ValueError(f"model_type is {kind!r}; known are {_VIT!r} and {_CONVNEXT!r}")
    wanted = "silu" if values.get("use_gated_mlp") else "gelu"
    if values.get("hidden_act", wanted) != wanted:
        raise ValueError(f"hidden_act is {values['hidden_act']!r}; our towers have {wanted!r} here")
    return {ours: values[theirs] for ours, theirs in _HIDDEN[kind].items() if theirs in values}
