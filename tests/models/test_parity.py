"""Towers against transformers' implementation with the same random weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTConfig, DINOv3ViTModel

from orchestrator.models import PRESETS, ConvNeXt, ConvNeXtConfig, VisionTransformer, ViTConfig, count_params

_VIT_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.patch_embeddings.": "patch_embed.",
    r"model.layer.(\d+).": r"blocks.\1.",
    "attention.o_proj": "attention.proj",
    "layer_scale1.lambda1": "scale1.gamma",
    "layer_scale2.lambda1": "scale2.gamma",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
_CONVNEXT_NAMES = {
    r"model.stages.(\d+).downsample_layers.": r"downsamples.\1.",
    r"model.stages.(\d+).layers.": r"stages.\1.",
    "depthwise_conv": "depthwise",
    "pointwise_conv1": "up",
    "pointwise_conv2": "down",
    r"^layer_norm": "norm",
    r"\.layer_norm": ".norm",
}


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return out


def with_fused_qkv(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    out = {name: tensor for name, tensor in state.items() if not re.search(r"attention\.[qkv]_proj", name)}
    for index in range(depth):
        prefix = f"blocks.{index}.attention."
        out[prefix + "qkv.weight"] = torch.cat([state[f"{prefix}{part}_proj.weight"] for part in "qkv"])
        for part in "qv":
            if f"{prefix}{part}_proj.bias" in state:
                out[f"{prefix}qkv.{part}_bias"] = state[f"{prefix}{part}_proj.bias"]
    return out


def randomise(model: nn.Module) -> None:
    """Weights large enough that every parameter matters in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = re.search(r"norm\d?\.weight|lambda1|gamma", name)
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.1 * noise)


def theirs_of(config: ViTConfig) -> DINOv3ViTConfig:
    return DINOv3ViTConfig(
        patch_size=config.patch_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_hidden or 4 * config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        num_register_tokens=config.num_storage_tokens,
        use_gated_mlp=config.ffn == "swiglu",
        hidden_act="silu" if config.ffn == "swiglu" else "gelu",
        query_bias=config.qkv_bias,
        value_bias=config.qkv_bias,
    )


@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(patch_size=8, dim=48, depth=3, num_heads=2),
        ViTConfig(patch_size=16, dim=64, depth=2, num_heads=4, ffn="swiglu", ffn_hidden=96, qkv_bias=False),
    ],
    ids=["mlp", "swiglu"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_vit_equals_transformers(config: ViTConfig, size: tuple[int, int], masked: bool) -> None:
    theirs = DINOv3ViTModel(theirs_of(config)).eval()
    randomise(theirs)
    ours = VisionTransformer(config).eval()
    ours.load_state_dict(with_fused_qkv(renamed(theirs.state_dict(), _VIT_NAMES), config.depth))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    num_patches = size[0] * size[1] // config.patch_size**2
    masks = torch.rand(2, num_patches, generator=torch.Generator().manual_seed(2)) < 0.4 if masked else None
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=masks).last_hidden_state
        features = ours(images, masks)
    got = torch.cat([features.cls[:, None], features.storage, features.patches], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_convnext_equals_transformers(size: tuple[int, int]) -> None:
    config = ConvNeXtConfig((1, 2, 2, 1), (8, 16, 24, 32))
    theirs = DINOv3ConvNextModel(
        DINOv3ConvNextConfig(depths=[1, 2, 2, 1], hidden_sizes=[8, 16, 24, 32])
    ).eval()
    randomise(theirs)
    ours = ConvNeXt(config).eval()
    missing = ours.load_state_dict(renamed(theirs.state_dict(), _CONVNEXT_NAMES), strict=False)
    assert missing.missing_keys == ["mask_token"]
    assert not missing.unexpected_keys
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images)
        features = ours(images)
    torch.testing.assert_close(features.cls, expected.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.patches, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_s", "vit_s_plus", "vit_b", "vit_l", "vit_h_plus", "vit_7b"])
def test_presets_have_the_published_shape(name: str) -> None:
    config = PRESETS[name]
    assert isinstance(config, ViTConfig)
    with torch.device("meta"):
        ours, theirs = VisionTransformer(config), DINOv3ViTModel(theirs_of(config))
    local_norm = 2 * config.dim if config.separate_local_norm else 0
    assert count_params(ours) - local_norm == count_params(theirs)
