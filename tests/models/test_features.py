"""Intermediate layers and batches of many sizes."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor

from orchestrator.models import BackboneFeatures, ConvNeXtConfig, ViTConfig, build, embed_many, from_config
from orchestrator.models.convert import from_layout, transformers_config

VIT = ViTConfig(patch_size=8, dim=48, depth=4, num_heads=2)
CONVNEXT = ConvNeXtConfig((1, 2, 2, 1), (8, 16, 24, 32))


def pair(config: ViTConfig | ConvNeXtConfig) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Theirs and ours with the same weights, far from their initial ones."""
    values = transformers_config(config)
    kind = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    theirs = transformers.AutoModel.from_config(kind).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    ours = from_config(config).eval()
    known = {"num_heads": config.num_heads} if isinstance(config, ViTConfig) else {}
    ours.load_state_dict(from_layout(theirs.state_dict(), **known)[1])
    return theirs, ours


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(features: BackboneFeatures) -> Tensor:
    return torch.cat([features.cls[:, None], features.storage, features.patches], dim=1)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_blocks_equal_transformers_hidden_states() -> None:
    theirs, ours = pair(VIT)
    batch = images(2, 3, 16, 40)
    with torch.no_grad():
        states = theirs(batch, output_hidden_states=True).hidden_states
        raw = ours.features(batch, [0, 1, 2, 3], norm=False)
        normed = ours.features(batch, 4)
        for state, features in zip(states[1:], raw, strict=True):
            close(tokens(features), state)
        for state, features in zip(states[1:], normed, strict=True):
            close(tokens(features), theirs.norm(state))
        assert features.storage.shape == (2, 4, 48)
        assert torch.equal(tokens(ours.features(batch)[0]), tokens(ours(batch)))


def test_stages_equal_transformers_hidden_states() -> None:
    theirs, ours = pair(CONVNEXT)
    batch = images(2, 3, 32, 96)
    with torch.no_grad():
        states = theirs(batch, output_hidden_states=True).hidden_states
        raw, normed = ours.features(batch, 4, norm=False), ours.features(batch, [0, 1, 2, 3])
        for stage, features in enumerate(raw):
            close(features.patches, states[stage + 1].flatten(2).transpose(1, 2))
            close(features.cls, states[stage + 1].mean(dim=(2, 3)))
            assert features.patches.shape == (2, 8 * 24 // 4**stage, CONVNEXT.dims[stage])
            assert features.storage.shape == (2, 0, CONVNEXT.dims[stage])
        close(normed[3].patches, theirs(batch).last_hidden_state[:, 1:])
        assert torch.equal(normed[2].patches, raw[2].patches), "only the last stage has a norm"
        assert torch.equal(tokens(ours.features(batch)[0]), tokens(ours(batch)))


@pytest.mark.parametrize("name", ["vit_pico", "convnext_mini"])
def test_layers_come_in_the_order_asked_for(name: str) -> None:
    model, batch = build(name).eval(), images(1, 3, 32, 32)
    last_two = model.features(batch, 2)
    for asked in ([-1, 2], [3, -2], [3, 2]):
        assert all(
            torch.equal(got.cls, expected.cls)
            for got, expected in zip(model.features(batch, asked), reversed(last_two), strict=True)
        )
    first, again = model.features(batch, [1, 1])
    assert torch.equal(first.patches, again.patches)


@pytest.mark.parametrize("name", ["vit_pico", "convnext_mini"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [(0, "ask for 1 to 4"), (5, "ask for 1 to 4"), ([4], "0 to 3"), ([-5], "0 to 3"), ([], "0 to 3")],
)
def test_layers_that_are_not_there_are_refused(name: str, layers: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name).features(images(1, 3, 32, 32), layers)


@pytest.mark.parametrize("name", ["vit_femto", "convnext_mini"])
def test_many_sizes_keep_their_order_and_share_forwards(name: str) -> None:
    model = build(name).eval()
    sizes = [(32, 48), (48, 32), (32, 48), (64, 16), (32, 48), (48, 32)]
    batch = [
        torch.randn(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)
    ]
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: forwards.append(len(inputs[0])))
    found = embed_many(model, batch, 2, batch=2)
    assert sorted(forwards) == [1, 1, 2, 2]
    for image, layers in zip(batch, found, strict=True):
        for got, expected in zip(layers, model.features(image[None], 2), strict=True):
            for part, wanted in zip(got, expected, strict=True):
                torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-5)
            assert not got.cls.requires_grad


def test_many_sizes_refuse_what_is_no_image() -> None:
    model = build("vit_femto")
    with pytest.raises(ValueError, match=r"image 1 is \(1, 3, 8, 8\); expected \(3, H, W\)"):
        embed_many(model, [images(3, 8, 8), images(1, 3, 8, 8)])
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        embed_many(model, [images(3, 8, 12)])
    assert embed_many(model, []) == []
