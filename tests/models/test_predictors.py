"""Heads of fine-tuning: maps where they belong, the same gradient each time, and depth within its bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import interpolate

from orchestrator.models import BackboneFeatures
from orchestrator.models.predictors import ClassHead, DepthHead, MapHead, head_of, resized


def features(rows: int, columns: int, dim: int = 16) -> BackboneFeatures:
    pick = torch.Generator().manual_seed(0)
    return BackboneFeatures(
        torch.randn(2, dim, generator=pick),
        torch.zeros(2, 0, dim),
        torch.randn(2, rows * columns, dim, generator=pick),
    )


@pytest.mark.parametrize("size", [(12, 20), (9, 14), (3, 5)])
def test_maps_are_made_larger_as_torch_does(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 3, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        resized(x, size), interpolate(x, size, mode="bilinear", align_corners=False), rtol=1e-5, atol=1e-6
    )


def test_a_map_lies_as_the_patches_do() -> None:
    """Of the linear head each patch's value is the layer's, and lies in the middle of its pixels."""
    head, given = MapHead(16, 4), features(3, 5)
    out = head(given, (3 * 7, 5 * 7))
    assert out.shape == (2, 4, 21, 35)
    wanted = given.patches @ head.last.weight[:, :, 0, 0].T + head.last.bias
    torch.testing.assert_close(out[:, :, 3::7, 3::7].flatten(2).transpose(1, 2), wanted, rtol=1e-4, atol=1e-5)


def test_the_decoder_couples_no_samples() -> None:
    head, given = MapHead(16, 4, 32, 2), features(3, 3)
    out = head(given, (24, 24))
    alone = head(BackboneFeatures(*(part[:1] for part in given)), (24, 24))
    torch.testing.assert_close(out[:1], alone, rtol=1e-5, atol=1e-5)
    out.square().sum().backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in head.parameters())


@pytest.mark.parametrize("num_bins", [None, 8])
def test_depth_is_between_the_nearest_and_the_farthest(num_bins: int | None) -> None:
    head = DepthHead(16, 0.5, 8.0, num_bins)
    out = head(features(2, 2), (8, 8))
    assert out.shape == (2, 8, 8)
    assert (out >= math.log(0.5) - 1e-5).all()
    assert (out <= math.log(8.0) + 1e-5).all()
    with torch.no_grad():
        head.map.last.weight.zero_()
    # All bins alike, or nothing added: the geometric mean.
    torch.testing.assert_close(head(features(2, 2), (8, 8)), torch.full((2, 8, 8), math.log(2.0)))
    if num_bins:
        with torch.no_grad():
            head.map.last.bias[-1] = 50.0
        last = math.log(8.0) - math.log(16) / num_bins / 2
        torch.testing.assert_close(head(features(2, 2), (8, 8)), torch.full((2, 8, 8), last))


def test_a_head_is_built_from_its_description_alone() -> None:
    assert isinstance(head_of({"type": "classification", "pool": "cls"}, 16, 3), ClassHead)
    assert isinstance(head_of({"type": "segmentation", "width": 32, "num_doublings": 1}, 16, 3), MapHead)
    described = {
        "type": "depth",
        "nearest": 0.1,
        "farthest": 10.0,
        "num_bins": None,
        "width": 32,
        "num_doublings": 0,
    }
    assert isinstance(head_of(described, 16, 0), DepthHead)
    for wrong in (
        {"type": "detection"},
        {"type": "classification", "pool": "max"},
        {"type": "segmentation"},
        {},
    ):
        with pytest.raises(ValueError, match="knows no head of type"):
            head_of(wrong, 16, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"type": "segmentation", "width": 32, "num_doublings": 10**9},
        {"type": "segmentation", "width": 2**20, "num_doublings": 1},
        {"type": "segmentation", "width": 8, "num_doublings": 1},
        {"type": "segmentation", "width": True, "num_doublings": 1},
        {"type": "detection", "num_queries": 10**12, "width": 32, "num_layers": 1},
        {"type": "detection", "num_queries": 4, "width": 32, "num_layers": 10**9},
        {"type": "detection", "num_queries": 4, "width": 32, "num_layers": 0},
        {"type": "depth", "nearest": 0.1, "farthest": 9.0, "num_bins": -1, "width": 32, "num_doublings": 0},
        {"type": "depth", "nearest": 9.0, "farthest": 0.1, "num_bins": 4, "width": 32, "num_doublings": 0},
        {
            "type": "depth",
            "nearest": 0.1,
            "farthest": math.nan,
            "num_bins": 4,
            "width": 32,
            "num_doublings": 0,
        },
    ],
)
def test_a_head_beyond_any_setting_is_refused_before_it_is_built(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="head"):
        head_of(wrong, 16, 3)


def test_a_head_of_classes_has_some() -> None:
    with pytest.raises(ValueError, match="no classes"):
        head_of({"type": "classification", "pool": "cls"}, 16, 0)
