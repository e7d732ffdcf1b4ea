"""Recomputed and compiled blocks give the losses and gradients of plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from orchestrator.models import build
from orchestrator.models.speed import compile_blocks, recompute_blocks


def gradients(
    prepare: Callable[[nn.Module], None] | None, name: str, drop_path: float
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    tower = build(name, drop_path=drop_path).train()
    if prepare is not None:
        prepare(tower)
    crops, small = torch.randn(4, 3, 64, 64), torch.randn(6, 3, 32, 32)
    wide, near = tower(crops, generator=torch.Generator().manual_seed(3), locals_BCHW=small)
    loss = wide.patches.square().mean() + near.cls.sin().sum()
    loss.backward()
    return loss.detach(), {
        key: value.grad for key, value in tower.named_parameters() if value.grad is not None
    }


def compiled(tower: nn.Module) -> None:
    compile_blocks(tower, "aot_eager")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("prepare", "name", "drop_path"),
    [
        (recompute_blocks, "vit_femto", 0.4),
        (recompute_blocks, "convnext_mini", 0.4),
        (compiled, "vit_femto", 0.0),
    ],
)
def test_the_same_losses_and_gradients(
    prepare: Callable[[nn.Module], None], name: str, drop_path: float
) -> None:
    plain_loss, plain = gradients(None, name, drop_path)
    loss, found = gradients(prepare, name, drop_path)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=1e-6)
    assert found.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_recomputed_blocks_keep_less() -> None:
    """Bytes that autograd saves for the backward pass, counted as they are packed."""

    def saved(recompute: bool) -> int:
        tower = build("vit_pico").train()
        if recompute:
            recompute_blocks(tower)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = tower(torch.randn(2, 3, 64, 64))
        features.cls.sum().backward()
        return sum(kept.values())

    assert saved(True) < 0.5 * saved(False)


def test_nothing_is_recomputed_without_gradients() -> None:
    tower = build("vit_femto").eval()
    recompute_blocks(tower)
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    for block in tower.blocks:
        block.norm1.register_forward_hook(count)
    with torch.no_grad():
        tower(torch.randn(1, 3, 32, 32))
    assert calls == len(tower.blocks)
