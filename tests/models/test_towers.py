"""Behaviour of the towers in training: masks, drawn randomness, gradients, and who reads whose parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orchestrator.models import (
    BertConfig,
    BertEncoder,
    BertTower,
    PrototypeHead,
    TextAligner,
    TextConfig,
    TextTower,
    build,
)
from orchestrator.models.blocks import add_residual, draw_rows
from orchestrator.models.rope import axial_angles, log_uniform_rescales, rotate, rotation

TOWERS = ["vit_femto", "convnext_mini"]
Call = Callable[[nn.Module], tuple[Tensor, ...]]


def images(batch: int = 4, height: int = 64, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(module: nn.Module) -> nn.Module:
    """Undoes the tiny initial LayerScale, so that the blocks show in the output."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
    return module


@pytest.mark.parametrize("name", TOWERS)
def test_forward_leaves_the_global_generator_alone(name: str) -> None:
    model = build(name, drop_path=0.5).train()
    before = torch.get_rng_state()
    model(images(), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", TOWERS)
def test_training_draws_only_from_the_generator(name: str) -> None:
    model = awake(build(name, drop_path=0.5)).train()
    first, again, other = (model(images(8), generator=seeded(seed)).cls for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    still = model(images(8)).cls
    assert torch.equal(still, model.eval()(images(8), generator=seeded(1)).cls)


@pytest.mark.parametrize("name", TOWERS)
def test_masks_hide_the_masked_pixels(name: str) -> None:
    model = awake(build(name)).eval()
    stride = model.patch_size
    masks = torch.zeros(1, (64 // stride) * (32 // stride), dtype=torch.bool)
    masks[0, 3] = True
    row, column = divmod(3, 32 // stride)
    hidden = images(1)
    hidden[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = 7.0
    with torch.no_grad():
        assert torch.equal(model(images(1), masks).patches, model(hidden, masks).patches)
        assert not torch.allclose(model(images(1)).patches, model(hidden).patches)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_parameter_gets_a_gradient(name: str, masked: bool) -> None:
    model = build(name).train()
    num_patches = 64 * 32 // model.patch_size**2
    features = model(images(), torch.rand(4, num_patches, generator=seeded()) < 0.5 if masked else None)
    sum(tensor.square().sum() for tensor in features).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", TOWERS)
def test_wrong_shapes_are_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        model(images(1, 60, 32))
    with pytest.raises(ValueError, match="masks are"):
        model(images(2), torch.zeros(1, 64 * 32 // model.patch_size**2, dtype=torch.bool))
    with pytest.raises(ValueError, match="masks are"):
        model(images(1), torch.zeros(1, 64 * 32 // model.patch_size**2))


def test_local_norm_is_used_for_local_crops_in_training_only() -> None:
    model = build("vit_femto", separate_local_norm=True)
    with torch.no_grad():
        model.local_norm.bias.fill_(3.0)
    shared = model(images(), is_local=False)
    local = model(images(), is_local=True)
    assert torch.allclose(local.cls, shared.cls + 3.0, atol=1e-5)
    assert torch.allclose(local.storage, shared.storage + 3.0, atol=1e-5)
    assert torch.equal(local.patches, shared.patches)
    assert torch.equal(model.eval()(images(), is_local=True).cls, shared.cls)


def test_half_precision_weights_take_float_images() -> None:
    for name in TOWERS:
        assert build(name).to(torch.bfloat16)(images(1)).cls.dtype == torch.bfloat16


def test_autocast_training_step() -> None:
    for name in TOWERS:
        model = build(name, drop_path=0.5).train()
        with torch.autocast("cpu", torch.bfloat16):
            features = model(images(), generator=seeded())
        features.cls.float().sum().backward()
        assert all(
            parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters()
        )


def test_keys_have_no_bias() -> None:
    qkv = build("vit_femto").blocks[0].attention.qkv
    with torch.no_grad():
        qkv.q_bias.fill_(1.0)
        qkv.v_bias.fill_(2.0)
        query, key, value = qkv(torch.zeros(1, 1, 48)).chunk(3, dim=-1)
    assert (query == 1).all()
    assert (key == 0).all()
    assert (value == 2).all()


def test_dropped_rows_keep_the_expectation() -> None:
    x, generator = torch.ones(10, 3), seeded()
    rows = [draw_rows(10, 0.4, generator, x.device) for _ in range(2000)]
    assert all(row is not None and len(row) == 6 and len(row.unique()) == 6 for row in rows)
    total = sum((add_residual(x, lambda kept: 5 * kept, row) for row in rows), torch.zeros(10, 3))
    torch.testing.assert_close(total / len(rows), torch.full((10, 3), 6.0), atol=0.35, rtol=0)
    assert draw_rows(1, 0.9, generator, x.device) is None
    assert draw_rows(8, 0.0, generator, x.device) is None


def test_rope_equals_complex_rotation() -> None:
    grid_h, grid_w, head_dim, base = 3, 5, 16, 100.0
    angles = axial_angles(grid_h, grid_w, head_dim, base, torch.device("cpu"))
    x = torch.randn(1, 1, 1 + grid_h * grid_w, head_dim, dtype=torch.float64, generator=seeded())
    got = rotate(x, *rotation(angles, num_prefix=1, rescale=1.5))
    for patch in range(grid_h * grid_w):
        row, column = divmod(patch, grid_w)
        centres = ((2 * row + 1) / grid_h - 1, (2 * column + 1) / grid_w - 1)
        for channel in range(head_dim // 2):
            axis, k = divmod(channel, head_dim // 4)
            angle = 2 * math.pi * 1.5 * centres[axis] / base ** (4 * k / head_dim)
            pair = complex(x[0, 0, patch + 1, channel], x[0, 0, patch + 1, channel + head_dim // 2])
            turned = pair * complex(math.cos(angle), math.sin(angle))
            assert got[0, 0, patch + 1, channel].item() == pytest.approx(turned.real, abs=1e-5)
            assert got[0, 0, patch + 1, channel + head_dim // 2].item() == pytest.approx(
                turned.imag, abs=1e-5
            )
    assert torch.equal(got[:, :, 0], x[:, :, 0])


def test_rescales_are_log_uniform() -> None:
    logs = torch.tensor(log_uniform_rescales(4000, 2.0, seeded())).log2()
    assert -1 <= logs.min() < -0.99
    assert 0.99 < logs.max() <= 1
    assert logs.mean().abs() < 0.05
    assert logs.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.05)


def test_rescale_is_drawn_anew_for_each_block() -> None:
    model = build("vit_femto", drop_path=0.0).train()
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][0]))
    model(images(), generator=seeded())
    assert not torch.allclose(seen[0], seen[1])


def test_prototype_head() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(dim=16, hidden=32, bottleneck=8, num_prototypes=20)
    x = torch.randn(5, 16)
    code, logits = head(x)
    torch.testing.assert_close(code.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(logits, code @ head.prototypes.weight.T)
    assert head.prototypes.bias is None
    again, none = head(x, with_logits=False)
    assert none is None
    assert torch.equal(again, code)


def test_text_tower_ignores_what_follows_the_end() -> None:
    torch.manual_seed(0)
    tower = TextTower(TextConfig(vocab_size=50, context=12, dim=32, depth=2, num_heads=4, output_dim=24))
    tokens = torch.randint(50, (3, 12), generator=seeded())
    lengths = torch.tensor([4, 12, 7])
    padded = tokens.clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0
    got = tower(tokens, lengths)
    assert got.shape == (3, 24)
    torch.testing.assert_close(got, tower(padded, lengths))
    torch.testing.assert_close(got[0], tower(tokens[:1, :4])[0])
    earlier = tokens.clone()
    earlier[0, 0] += 1 if earlier[0, 0] == 0 else -1
    assert not torch.allclose(got[0], tower(earlier, lengths)[0])
    with pytest.raises(ValueError, match="context is 12"):
        tower(torch.zeros(1, 13, dtype=torch.int64))


def test_text_aligner_pools_cls_and_patches() -> None:
    torch.manual_seed(0)
    tower, aligner = build("vit_femto").eval(), awake(TextAligner(48, 20, num_heads=2))
    with torch.no_grad():
        features = tower(images(8))
        plain = aligner.eval()(features, seeded())
        shuffled = features._replace(patches=features.patches.flip(1))
        # Without RoPE the order of the patches cannot matter.
        torch.testing.assert_close(aligner(shuffled), plain)
        assert plain.shape == (8, 20)
        first, again, other = (aligner.train()(features, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, plain)


def test_text_aligner_can_leave_the_patches_out() -> None:
    """Without blocks, in which CLS looks at the patches, they count in the pooled mean only."""
    features = build("vit_femto").eval()(images(2))
    other = features._replace(patches=features.patches.flip(-1))
    for pool, width in (("cls_and_patches", 96), ("cls", 48)):
        aligner = TextAligner(48, 20, num_blocks=0, pool=pool).eval()
        assert aligner.proj.weight.shape == (20, width)
        assert torch.allclose(aligner(features), aligner(other), atol=1e-6) == (pool == "cls")
        assert aligner.patches(features).shape == (2, features.patches.shape[1], 20)


def test_text_aligner_may_share_one_projection_or_none() -> None:
    """As published: [CLS, mean of patches] as it is where that is wide enough, else one matrix for both halves."""
    features = build("vit_femto").eval()(images(2))
    torch.manual_seed(0)
    for width, shape in ((96, None), (20, (10, 48))):
        aligner = TextAligner(48, width, num_blocks=0, projection="shared").eval()
        assert (shape is None) == (not list(aligner.proj.parameters()))
        cls, patches = aligner.norm(features.cls), aligner.norm(features.patches)
        if shape is not None:
            assert aligner.proj.weight.shape == shape
            cls, patches = cls @ aligner.proj.weight.T, patches @ aligner.proj.weight.T
        embedding = aligner(features)
        torch.testing.assert_close(embedding, torch.cat([cls, patches.mean(1)], -1))
        # A patch is compared in the half of the patches; the image is CLS's half and the mean of these.
        own = aligner.patches(features)
        assert not own[..., : width // 2].any()
        torch.testing.assert_close(own.mean(1)[:, width // 2 :], embedding[:, width // 2 :])
    alone = TextAligner(48, 48, num_blocks=0, projection="shared", pool="cls").eval()
    torch.testing.assert_close(alone(features), alone.norm(features.cls))
    assert alone.patches(features).shape == (2, features.patches.shape[1], 48)
    with pytest.raises(ValueError, match="odd"):
        TextAligner(48, 21, projection="shared")


def test_text_aligner_takes_the_published_widths_without_biases() -> None:
    with torch.device("meta"):
        aligner = TextAligner(1024, 2048, hidden=2752, qkv_bias=False, projection="shared")
    assert [block.ffn.gate.out_features for block in aligner.blocks] == [2752, 2752]
    assert not [name for name, _ in aligner.named_parameters() if "q_bias" in name or name == "proj.weight"]


def test_text_tower_starts_with_clips_deviations() -> None:
    """At width 256 and depth 6: 0.063, 0.044 and 0.018 (recipe.md)."""
    torch.manual_seed(0)
    tower = TextTower(TextConfig(100, 12, dim=256, depth=6, num_heads=4, qkv_bias=False, init="by_width"))
    wanted = {"attention.qkv.weight": 0.0625, "ffn.up.weight": 0.0442, "ffn.down.weight": 0.0180}
    wanted["attention.proj.weight"] = 0.0180
    seen = set()
    for name, weight in tower.blocks.named_parameters():
        for ending, std in wanted.items():
            if name.endswith(ending):
                assert weight.std().item() == pytest.approx(std, rel=0.02), name
                seen.add(ending)
        assert not name.endswith("q_bias")
    assert seen == set(wanted)
    plain = TextTower(TextConfig(100, 12, dim=256, depth=1, num_heads=4))
    assert plain.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)


def _scatter_parameters(module: nn.Module) -> None:
    """Empties every parameter except while the module that owns it runs, like ZeRO-3's gathering hooks."""
    for child in module.modules():
        own = list(child.parameters(recurse=False))
        full = [parameter.data for parameter in own]

        def gather(_: nn.Module, __: object, own: list[Any] = own, full: list[Any] = full) -> None:
            for parameter, data in zip(own, full, strict=True):
                parameter.data = data

        def release(_: nn.Module, __: object, ___: object, own: list[Any] = own) -> None:
            for parameter in own:
                parameter.data = torch.empty(0)

        child.register_forward_pre_hook(gather)
        child.register_forward_hook(release)
        release(child, None, None)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: build("vit_femto", drop_path=0.5, separate_local_norm=True), "images"),
        (lambda: build("vit_femto", ffn="swiglu", ffn_hidden=64), "images"),
        (lambda: build("convnext_mini", drop_path=0.5), "images"),
        (lambda: PrototypeHead(48, 32, 16, 24), "vectors"),
        (lambda: TextTower(TextConfig(50, 12, dim=32, depth=1, num_heads=4, output_dim=8)), "tokens"),
        (lambda: BertTower(BertEncoder(BertConfig(50, 12, 32, 2, 4, 64)), 8), "tokens"),
    ],
    ids=["vit", "swiglu", "convnext", "head", "text", "bert"],
)
def test_modules_read_only_their_own_parameters(make: Callable[[], nn.Module], call: str) -> None:
    module = make().train()

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            if call == "images":
                return (
                    *module(images(), None, seeded()),
                    *module(images(seed=1), None, seeded(), is_local=True),
                    *module.features(images(), 2)[0],
                )
            if call == "tokens":
                return (module(torch.arange(12)[None], torch.tensor([5])),)
            return module(torch.randn(3, 48, generator=seeded()))

    expected = run()
    _scatter_parameters(module)
    assert all(parameter.numel() == 0 for parameter in module.parameters())
    for got, want in zip(run(), expected, strict=True):
        assert torch.equal(got, want)
