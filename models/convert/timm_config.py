"""How timm builds a tower of our shape: one of its architectures, and the arguments that make it ours."""

from __future__ import annotations

import math
from typing import Any

from ..configs import RGB, Config, ConvNeXtConfig, ViTConfig

# Its architectures by width, depth and feed-forward. Any of them becomes any other by its arguments, so a shape that
# is not here is built from the small one.
_VITS = {
    (384, 12, "mlp"): "vit_small_patch16_dinov3",
    (384, 12, "swiglu"): "vit_small_plus_patch16_dinov3",
    (768, 12, "mlp"): "vit_base_patch16_dinov3",
    (1024, 24, "mlp"): "vit_large_patch16_dinov3",
    (1280, 32, "swiglu"): "vit_huge_plus_patch16_dinov3",
    (4096, 40, "swiglu"): "vit_7b_patch16_dinov3",
}
_CONVNEXTS = {
    ((3, 3, 9, 3), (96, 192, 384, 768)): "convnext_tiny",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "convnext_small",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "convnext_base",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "convnext_large",
}
# What its DINOv3 towers are built with; no argument changes it.
_VIT_NORM_EPS = 1e-5
# Its ConvNeXt halves the map once more before the first stage where the stem has a stride of 2, and widens the
# convolutions of a stage in the place of a stride once the map is 32 times smaller than the image.
_OTHER_STEM_STRIDES = 2
_LARGEST_STEM_STRIDE = 7


def timm_config(config: Config) -> dict[str, Any]:
    """The `architecture` and `model_args` of a config.json that `timm.create_model("local-dir:FOLDER")` reads.

    The model takes images of any size that the patch divides, has no classifier, and its forward gives CLS. Drop-path
    is left at 0: it is training's.

    Raises:
        ValueError: timm cannot build such a tower: a bias on keys, another epsilon of the norms of a ViT than 1e-5,
            or a ConvNeXt with a stem of stride 2, or 8 and more.
    """
    return _vit(config) if isinstance(config, ViTConfig) else _convnext(config)


def _vit(config: ViTConfig) -> dict[str, Any]:
    if config.key_bias:
        raise ValueError("timm's towers have no bias on keys (key_bias)")
    if config.norm_eps != _VIT_NORM_EPS:
        raise ValueError(f"norm_eps is {config.norm_eps}; timm's DINOv3 towers have {_VIT_NORM_EPS} only")
    name = _VITS.get((config.dim, config.depth, config.ffn), "vit_small_patch16_dinov3")
    is_gated = config.ffn == "swiglu"
    arguments = {
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": _ratio(config.ffn_hidden or 4 * config.dim, config.dim),
        "swiglu_mlp": is_gated,
        # With an alignment, of 1 too, gate and value have a matrix each, as in the published towers.
        "swiglu_align_to": int(is_gated),
        "num_reg_tokens": config.num_storage_tokens,
        "qkv_bias": config.qkv_bias,
        "init_values": config.layer_scale_init,
        "rope_temperature": config.rope_base,
        "dynamic_img_size": True,
        "global_pool": "token",
    }
    _add_channels(arguments, config)
    has_twin = config.qkv_bias and "7b" not in name
    return {"architecture": f"{name}_qkvb" if has_twin else name, "model_args": arguments}


def _convnext(config: ConvNeXtConfig) -> dict[str, Any]:
    stride = config.stem_stride
    if stride == _OTHER_STEM_STRIDES or stride > _LARGEST_STEM_STRIDE:
        raise ValueError(
            f"stem_stride is {stride}; timm's ConvNeXt of such a stem has other strides in its stages"
        )
    name = _CONVNEXTS.get((config.depths, config.dims), "convnext_tiny")
    arguments = {
        "depths": list(config.depths),
        "dims": list(config.dims),
        "patch_size": stride,
        "norm_eps": config.norm_eps,
        "ls_init_value": config.layer_scale_init,
    }
    _add_channels(arguments, config)
    return {"architecture": name, "model_args": arguments}


def _add_channels(arguments: dict[str, Any], config: Config) -> None:
    if config.num_channels != RGB:
        arguments["in_chans"] = config.num_channels


def _ratio(hidden: int, dim: int) -> float:
    """What timm multiplies `dim` by and rounds down to `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
