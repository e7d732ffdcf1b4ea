"""Learning-rate factors by depth and dropped rows, each against the rule written out anew."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.config.schedules import Optimizer, Schedule
from orchestrator.models import ConvNeXtConfig, build, convnext, preset, vit
from orchestrator.models.blocks import add_residual
from orchestrator.stages.common.nets import HeadedBackbone, block_generator, learning_rate_scales

from .small import HEADS

# --- layer-wise learning rates ----------------------------------------------------------------------------------


def rate_factor(name: str, model: str, decay: float, patch_embed: float) -> float:
    """The rule by hand: the last norm and the heads learn at the full rate, each block below at `decay` times more."""
    config = preset(model)
    if not name.startswith("backbone.") or re.match(r"backbone\.(local_)?norm\.", name):
        return 1.0
    depths = config.depths if isinstance(config, ConvNeXtConfig) else (config.depth,)
    if found := re.match(r"backbone\.stages\.(\d)\.(\d+)\.", name):
        below = sum(depths[: int(found[1])]) + int(found[2])
    elif found := re.match(r"backbone\.downsamples\.([123])\.", name):
        below = sum(depths[: int(found[1])])
    elif found := re.match(r"backbone\.blocks\.(\d+)\.", name):
        below = int(found[1])
    else:
        embeds = "backbone.downsamples.0." if len(depths) == 4 else "backbone.patch_embed."
        below = -1
        assert name.startswith(embeds) or name.endswith(("cls_token", "storage_tokens", "mask_token")), name
        return float(decay ** (sum(depths) + 1)) * (patch_embed if name.startswith(embeds) else 1.0)
    return float(decay ** (sum(depths) - below))


@pytest.mark.parametrize("model", ["vit_nano", "vit_7b's norms", "convnext_mini", "convnext_t"])
def test_every_parameter_has_the_rate_of_its_depth(model: str) -> None:
    model, norms, _ = model.partition("_7b's norms")
    model += "_femto" if norms else ""
    net = HeadedBackbone(model, 0.0, HEADS)
    if norms:
        net.backbone = build(model, separate_local_norm=True)
    names = [name for name, _ in net.named_parameters()]
    for decay, patch_embed in ((0.98, 0.2), (0.9, 1.0), (1.0, 0.2)):
        optimizer = Optimizer(lr=Schedule(peak=1e-3), layer_decay=decay, patch_embed_scale=patch_embed)
        scales = learning_rate_scales(net, optimizer)
        for name in names:
            wanted = rate_factor(name, model, decay, patch_embed)
            assert scales.get(name, 1.0) == pytest.approx(wanted), (name, decay)
        assert scales.keys() <= set(names)


def test_the_papers_factors_are_the_defaults() -> None:
    """12 blocks at 0.98, and the patch embedding at 0.2 times the rate of the tokens beside it."""
    scales = learning_rate_scales(HeadedBackbone("vit_s", 0.0, HEADS), Optimizer(lr=Schedule(peak=4e-4)))
    assert scales["backbone.patch_embed.weight"] == pytest.approx(0.2 * 0.98**13)
    assert scales["backbone.cls_token"] == pytest.approx(0.98**13)
    assert scales["backbone.blocks.0.attention.qkv.weight"] == pytest.approx(0.98**12)
    assert scales["backbone.blocks.11.scale2.gamma"] == pytest.approx(0.98)
    assert scales["backbone.norm.weight"] == 1.0


# --- drop-path on subsets of the batch --------------------------------------------------------------------------

Draws = list[tuple[int, tuple[int, ...]]]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    """Every draw of a forward: the batch, and the rows that take the branch."""
    seen: Draws = []
    for module in (vit, convnext):
        draw = module.draw_rows

        def spy(batch: int, *args: Any, draw: Any = draw) -> Tensor | None:
            rows: Tensor | None = draw(batch, *args)
            seen.append((batch, tuple(range(batch)) if rows is None else tuple(rows.tolist())))
            return rows

        monkeypatch.setattr(module, "draw_rows", spy)
    return seen


def forward(
    model: str, drop_path: float, seed: int = 0, step: int = 0, block: int = 0, num_globals: int = 20
) -> list[tuple[str, int]]:
    """One training forward of global and half as many local crops; the batches that reached each branch."""
    torch.manual_seed(0)
    net = HeadedBackbone(model, drop_path, HEADS).train()
    patch = net.patch_size
    reached: list[tuple[str, int]] = []
    for name, module in net.backbone.named_modules():
        if name.endswith((".attention", ".ffn", ".up")) and ".ffn." not in name:
            module.register_forward_pre_hook(lambda _, args, name=name: reached.append((name, len(args[0]))))
    pixels = torch.randint(256, (num_globals, 3, 2 * patch, 2 * patch), dtype=torch.uint8)
    small = pixels[: num_globals // 2, :, :patch, :patch]
    tokens = torch.zeros(1, dtype=torch.int64)
    net(pixels, small, tokens, (2, 2), None, block_generator(seed, step, block))
    return reached


def test_drop_path_computes_each_branch_on_an_exact_number_of_rows() -> None:
    for drop_path, kept in ((0.4, {20: 12, 10: 6}), (0.25, {20: 15, 10: 8}), (0.0, {20: 20, 10: 10})):
        reached = forward("vit_nano", drop_path)
        assert len(reached) == 6 * 2 * 2  # blocks, branches, sizes
        per_branch = {name: sorted(n for other, n in reached if other == name) for name, _ in reached}
        assert all(numbers == sorted(kept.values()) for numbers in per_branch.values()), drop_path


def test_drop_path_of_a_convnext_rises_linearly_with_depth() -> None:
    reached = forward("convnext_mini", 0.5)
    globals_, locals_ = reached[:6], reached[6:]
    assert [n for _, n in globals_] == [20, 18, 16, 14, 12, 10]
    assert [n for _, n in locals_] == [10, 9, 8, 7, 6, 5]


@pytest.mark.parametrize("model", ["vit_nano", "convnext_mini"])
def test_blocks_and_branches_drop_different_rows(draws: Draws, model: str) -> None:
    forward(model, 0.4, num_globals=40)
    dropping = [rows for batch, rows in draws if batch == 40 and len(rows) < 40]
    assert len(dropping) == (12 if model == "vit_nano" else 5)
    assert all(len(set(rows)) == len(rows) and max(rows) < 40 for rows in dropping)
    overlaps = [len(set(a) & set(b)) / min(len(a), len(b)) for a, b in itertools.combinations(dropping, 2)]
    if model == "vit_nano":  # equal counts: nested sets would be equal sets
        assert len(set(dropping)) == len(dropping)
    assert max(overlaps) < 1


@pytest.mark.parametrize("model", ["vit_nano", "convnext_mini"])
def test_dropped_rows_are_fixed_by_seed_step_and_block(draws: Draws, model: str) -> None:
    seen: list[Any] = []
    for place in ((3, 5, 1), (3, 5, 1), (4, 5, 1), (3, 6, 1), (3, 5, 2)):
        draws.clear()
        torch.manual_seed(len(seen))  # the global generator has no say
        forward(model, 0.4, *place, num_globals=40)
        seen.append(tuple(draws))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4


def test_over_all_subsets_the_mean_is_the_whole_branch() -> None:
    """Exactly, value and gradient: every choice of three rows of five once."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64, generator=random).requires_grad_()
    weight = torch.randn(4, 4, dtype=torch.float64, generator=random)

    def branch(rows: Tensor) -> Tensor:
        return torch.tanh(rows @ weight)

    subsets = [torch.tensor(rows) for rows in itertools.combinations(range(5), 3)]
    mean = torch.stack([add_residual(x, branch, rows) for rows in subsets]).mean(0)
    whole = x + branch(x)
    torch.testing.assert_close(mean, whole)
    for got, wanted in zip(
        torch.autograd.grad(mean.square().sum(), x), torch.autograd.grad(whole.square().sum(), x), strict=True
    ):
        torch.testing.assert_close(got, wanted)
