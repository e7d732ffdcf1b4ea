from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.models import ConvNeXt, build, count_params, layer_depths, preset
from orchestrator.models.cost import num_params

# Millions as the paper prints them (arXiv 2508.10104), and the precision of that print. test_parity compares
# the transformers with an independent implementation, to the parameter.
_PUBLISHED = {
    "vit_s": (21, 1),
    "vit_s_plus": (29, 1),
    "vit_b": (86, 1),
    "vit_l": (300, 10),
    "vit_h_plus": (840, 10),
    "vit_7b": (6716, 1),
    "convnext_t": (29, 1),
    "convnext_s": (50, 1),
    "convnext_b": (89, 1),
    "convnext_l": (198, 1),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    count = count_params(model)
    if isinstance(model, ConvNeXt):
        count += (model.dim + 1) * 1000  # the ConvNeXt figures count the classifier of ImageNet
    millions, precision = _PUBLISHED[name]
    assert count / 1e6 == pytest.approx(millions, rel=0.005, abs=precision)


@pytest.mark.parametrize(
    "name", ["vit_s", "vit_micro", "vit_nano", "vit_pico", "vit_femto", "convnext_t", "convnext_mini"]
)
def test_every_preset_runs_at_a_small_size(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
        side = 2 * model.patch_size
        features = model(torch.empty(2, 3, side, 2 * side), torch.zeros(2, 8, dtype=torch.bool))
    assert features.cls.shape == (2, model.dim)
    assert features.patches.shape == (2, 8, model.dim)


def test_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'vit_nanno'.*vit_nano"):
        preset("vit_nanno")


def test_unknown_setting_lists_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'drop_paths'.*drop_path"):
        preset("vit_nano", drop_paths=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 5}, "not a multiple"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"rope_rescale": 0.5}, "at least 1"),
        ({"ffn": "relu"}, "'mlp' or 'swiglu'"),
        ({"patch_size": True}, "patch_size is True; it must be a number, not true or false"),
        ({"rope_rescale": False}, "rope_rescale is False; it must be a number"),
    ],
)
def test_impossible_settings_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("vit_nano", **overrides)


def test_same_seed_same_weights() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(build("vit_femto").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["cls_token"], states[2]["cls_token"])


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = build("vit_nano", layer_scale_init=1e-5)
    for name, parameter in model.named_parameters():
        if name.endswith(("up.weight", "qkv.weight", "down.weight", "proj.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() <= 2
        if name.endswith("bias") and not name.startswith("patch_embed"):
            assert not parameter.any(), name
        if name.endswith("gamma"):
            assert (parameter == 1e-5).all()


def test_layer_depths_of_a_transformer() -> None:
    model = build("vit_femto")
    depths = layer_depths(model)
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    assert {depths[name] for name in ("cls_token", "storage_tokens", "mask_token", "patch_embed.weight")} == {
        0
    }
    assert depths["blocks.0.norm1.weight"] == 1
    assert depths["blocks.1.ffn.down.bias"] == 2
    assert depths["norm.weight"] == 3


def test_layer_depths_count_blocks_over_stages() -> None:
    depths = layer_depths(build("convnext_mini"))  # 1, 1, 3, 1 blocks
    assert depths["mask_token"] == depths["downsamples.0.0.weight"] == 0
    assert depths["stages.0.0.gamma"] == 1
    assert depths["downsamples.2.1.weight"] == depths["stages.2.0.gamma"] == 3
    assert depths["stages.2.2.gamma"] == 5
    assert depths["stages.3.0.gamma"] == 6
    assert depths["norm.bias"] == 7


def test_layer_depths_of_ten_or_more_blocks_do_not_mix_prefixes() -> None:
    with torch.device("meta"):
        depths = layer_depths(build("vit_s"))
    assert depths["blocks.1.norm1.weight"] == 2
    assert depths["blocks.11.norm1.weight"] == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"storage_tokens": 0}, "no setting 'storage_tokens'; did you mean num_storage_tokens"),
        ({"patch_size": "small"}, "patch_size is 'small'; it must be a"),
        ({"num_storage_tokens": 1.5}, "num_storage_tokens is 1.5; it must be a"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"key_bias": True, "qkv_bias": False}, "key_bias needs qkv_bias"),
    ],
)
def test_overrides_that_make_no_model_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("vit_nano", **overrides)


def test_a_key_bias_changes_what_rotated_keys_say() -> None:
    """Softmax cancels it without RoPE; with it, it is a preference for distances."""
    torch.manual_seed(0)
    model = build("vit_femto", key_bias=True).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images).patches
        attention = model.blocks[0].attention
        tokens = torch.randn(1, 5, 48)
        plain = attention(tokens)
        for block in model.blocks:
            block.attention.qkv.k_bias.fill_(2.0)
        torch.testing.assert_close(attention(tokens), plain, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(images).patches, before, rtol=1e-3, atol=1e-5)
    assert "blocks.0.attention.qkv.k_bias" in dict(model.named_parameters())
    assert count_params(model) == num_params(model.config)
