"""Clipping by submodule, against plain AdamW in one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.training.gradient_clipping import Clipper

from .conftest import Group
from .lab import Odd

CLIP_NORM = 0.3


def reference(world: int, clip_norm: float = CLIP_NORM) -> tuple[list[dict[str, float]], Odd]:
    """Three steps on all workers' inputs, each child's gradient clipped on its own by torch's function."""
    net = Odd(0)
    vectors = [param for param in net.parameters() if param.ndim == 1]
    matrices = [param for param in net.parameters() if param.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.04}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99))
    children = {
        "first": [net.first.weight],
        "second": [net.second.weight],
        "two": [net.two],
        "one": [net.one],
    }
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(world):
            torch.manual_seed(100 * step + rank)
            (net(torch.randn(4, 7)) / world).backward()
        found = {name: torch.nn.utils.clip_grad_norm_(part, clip_norm) for name, part in children.items()}
        norms.append({name: float(norm) for name, norm in found.items()})
        optimizer.step()
    return norms, net


@pytest.mark.parametrize(("zero", "world"), [(0, 1), (0, 3), (1, 2), (2, 3), (3, 1), (3, 2), (3, 3)])
def test_each_submodule_is_clipped_by_its_own_norm(
    group: Group, tmp_path: Path, zero: int, world: int
) -> None:
    truth = tmp_path / "truth.safetensors"
    got, *_ = group("clip", world, zero=zero, clip_norm=CLIP_NORM, truth=truth)
    norms, net = reference(world)
    over = [norm > CLIP_NORM for step in norms for norm in step.values()]
    assert any(over), "nothing was clipped"
    assert not all(over), "everything was: the whole gradient's norm would do as well"
    for mine, expected in zip(got, norms, strict=True):
        assert mine["grad_norm"] == pytest.approx(math.hypot(*expected.values()), rel=1e-5)
        for name, norm in expected.items():
            assert mine[f"grad_norm_{name}"] == pytest.approx(norm, rel=1e-5)
    weights = load_file(truth)
    for name, param in net.named_parameters():
        torch.testing.assert_close(
            weights[f"master/{name}"].view(param.shape), param.detach(), rtol=1e-4, atol=1e-6
        )


def test_last_bits_of_a_norm_do_not_move_what_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are sums over workers: their last bits depend on how many there are."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found, norms = [], []
    for bits in range(0, 64, 16):
        torch.manual_seed(0)
        gradient = torch.randn(50, dtype=torch.float64)

        def all_reduce(squares: Tensor, bits: int = bits) -> None:
            for _ in range(bits):
                squares.copy_(torch.nextafter(squares, torch.full_like(squares, math.inf)))

        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        norms.append(Clipper(["net"], 0.5).clip([[gradient]], 1.0, sharded=True)["net"])
        found.append(gradient)
    assert len(set(norms)) > 1, "else nothing is shown"
    assert min(norms) > 0.5
    for gradient in found:
        assert torch.equal(gradient, found[0])


def test_null_clips_nothing(group: Group, tmp_path: Path) -> None:
    truth = tmp_path / "truth.safetensors"
    group("clip", 2, clip_norm=None, truth=truth)
    (_, net), (_, clipped) = reference(2, math.inf), reference(2)
    weights = load_file(truth)
    for name, param in net.named_parameters():
        torch.testing.assert_close(
            weights[f"master/{name}"].view(param.shape), param.detach(), rtol=1e-4, atol=1e-6
        )
    assert any(
        not torch.allclose(param, dict(clipped.named_parameters())[name], rtol=1e-3)
        for name, param in net.named_parameters()
    ), "a clip would show"
