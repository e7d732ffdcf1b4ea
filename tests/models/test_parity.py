"""Masked images and the published shapes against transformers; test_convert.py has whole towers."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from orchestrator.models import PRESETS, VisionTransformer, ViTConfig, count_params
from orchestrator.models.convert import from_layout, transformers_config


def randomise(model: nn.Module) -> None:
    """Weights large enough that every parameter matters in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = re.search(r"norm\d?\.weight|lambda1|gamma", name)
            parameter.copy_(1 + 0.3 * noise if is_gain else 0.1 * noise)


def theirs_of(config: ViTConfig) -> DINOv3ViTConfig:
    values = transformers_config(config)
    assert values.pop("model_type") == "dinov3_vit"
    return DINOv3ViTConfig(**values)


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
    ours.load_state_dict(from_layout(theirs.state_dict(), num_heads=config.num_heads)[1])
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    num_patches = size[0] * size[1] // config.patch_size**2
    masks = torch.rand(2, num_patches, generator=torch.Generator().manual_seed(2)) < 0.4 if masked else None
    with torch.no_grad():
        expected = theirs(images, bool_masked_pos=masks).last_hidden_state
        features = ours(images, masks)
    got = torch.cat([features.cls[:, None], features.storage, features.patches], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_s", "vit_s_plus", "vit_b", "vit_l", "vit_h_plus", "vit_7b"])
def test_presets_have_the_published_shape(name: str) -> None:
    config = PRESETS[name]
    assert isinstance(config, ViTConfig)
    with torch.device("meta"):
        ours, theirs = VisionTransformer(config), DINOv3ViTModel(theirs_of(config))
    local_norm = 2 * config.dim if config.separate_local_norm else 0
    assert count_params(ours) - local_norm == count_params(theirs)
