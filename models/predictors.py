"""What makes predictions of a backbone's features: the heads that fine-tuning trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import linear
from .detr import DetectionHead
from .vit import BackboneFeatures

Pool = Literal["cls", "cls_and_patches"]
_POOLS = ("cls", "cls_and_patches")
# Channels of a group of GroupNorm, which couples no samples.
_GROUP = 16
# What a file may ask for, as the settings of `finetune`: beyond that somebody would build layers for hours.
_MOST = {"width": 4096, "num_doublings": 5, "num_bins": 4096, "num_queries": 1000, "num_layers": 24}


class ClassHead(nn.Module):
    """One linear layer on CLS, or on CLS and the mean of the patches.

    Args:
        dim: width of the features.
        num_classes: of the logits.
        pool: see above.
    """

    def __init__(self, dim: int, num_classes: int, pool: Pool = "cls_and_patches") -> None:
        super().__init__()
        self.pool = pool
        self.linear = linear(dim if pool == "cls" else 2 * dim, num_classes)

    def forward(self, features: BackboneFeatures, size: tuple[int, int] | None = None) -> Tensor:
        """Features of B images → logits (B, C). `size` is accepted for the common signature."""
        pooled = features.cls
        if self.pool == "cls_and_patches":
            pooled = torch.cat([pooled, features.patches.mean(dim=1)], dim=-1)
        logits: Tensor = self.linear(pooled)
        return logits


class MapHead(nn.Module):
    """Values for every pixel, from patches: a linear layer, or a few convolutions between which the map doubles.

    Args:
        dim: width of the features.
        channels: values of a pixel.
        width: channels of the convolutions; a multiple of 16.
        num_doublings: of the map before the last layer. With 0 the head is one linear layer.
    """

    def __init__(self, dim: int, channels: int, width: int = 128, num_doublings: int = 0) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        if num_doublings:
            self.steps.append(nn.Conv2d(dim, width, 1))
            self.steps += [_Doubling(width) for _ in range(num_doublings)]
        self.last = nn.Conv2d(width if num_doublings else dim, channels, 1)
        nn.init.trunc_normal_(self.last.weight, std=0.02)
        nn.init.zeros_(_bias(self.last))

    def forward(self, features: BackboneFeatures, size: tuple[int, int]) -> Tensor:
        """Features of B images of `size` → (B, C, H, W), bilinear from the head's map."""
        num_patches = features.patches.shape[1]
        rows = round(math.sqrt(num_patches * size[0] / size[1]))
        map_BCHW = features.patches.transpose(1, 2).unflatten(2, (rows, num_patches // rows))
        for step in self.steps:
            map_BCHW = step(map_BCHW)
        return resized(self.last(map_BCHW), size)


class DepthHead(nn.Module):
    """The logarithm of the depth of every pixel: as it comes, or the mean of bins between the nearest and the farthest.

    Args:
        dim, width, num_doublings: see :class:`MapHead`.
        nearest, farthest: in metres.
        num_bins: equally wide in the logarithm; None for a value as it comes, around the geometric mean of both.
    """

    def __init__(
        self,
        dim: int,
        nearest: float,
        farthest: float,
        num_bins: int | None,
        width: int = 128,
        num_doublings: int = 0,
    ) -> None:
        super().__init__()
        self.map = MapHead(dim, num_bins or 1, width, num_doublings)
        self.bounds, self.num_bins = (math.log(nearest), math.log(farthest)), num_bins

    def forward(self, features: BackboneFeatures, size: tuple[int, int]) -> Tensor:
        """Features of B images of `size` → ln of metres, float32 (B, H, W), within the bounds."""
        values_BCHW = self.map(features, size).float()
        low, high = self.bounds
        depth_BHW: Tensor
        if self.num_bins is None:
            depth_BHW = (values_BCHW[:, 0] + (low + high) / 2).clamp(low, high)
        else:
            step = (high - low) / self.num_bins
            centres = low + step * (torch.arange(self.num_bins, device=values_BCHW.device) + 0.5)
            depth_BHW = (values_BCHW.softmax(dim=1) * centres[:, None, None]).sum(dim=1)
        return depth_BHW


class _Doubling(nn.Module):
    """A map of twice the sides: bilinear, then a 3 × 3 convolution, GroupNorm and GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width // _GROUP, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        out: Tensor = F.gelu(self.norm(self.conv(resized(x_BCHW, (2 * height, 2 * width)))))
        return out


def resized(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """A map made larger, bilinear between the centres of its cells, as `interpolate(align_corners=False)`.

    By two products of matrices, whose gradient is the same each time: that of `interpolate` is not, on a GPU.
    """
    rows, columns = (
        _weights(before, after, x_BCHW) for before, after in zip(x_BCHW.shape[-2:], size, strict=True)
    )
    return rows @ x_BCHW @ columns.T


def _weights(before: int, after: int, like: Tensor) -> Tensor:
    """How much of each of the cells before is in each after, (after, before)."""
    places = (torch.arange(after, device=like.device, dtype=torch.float64) + 0.5) * before / after - 0.5
    places = places.clamp(0, before - 1)
    cells = torch.arange(before, device=like.device, dtype=torch.float64)
    return (1 - (places[:, None] - cells).abs()).clamp(min=0).to(like.dtype)


def head_of(record: Mapping[str, Any], dim: int, num_classes: int) -> nn.Module:
    """The head that a model folder describes, with random weights.

    Args:
        record: its `type` and settings.
        dim: width of the backbone's features.
        num_classes: of the task.

    Raises:
        ValueError: of a type that this version does not know, with settings that it has not, or without classes.
    """
    for name, most in _MOST.items():
        value = record.get(name)
        least = 0 if name == "num_doublings" else 1
        if isinstance(value, bool) or (isinstance(value, int) and not least <= value <= most):
            raise ValueError(
                f"{name} of the head is {value!r:.40}; it must be a whole number from {least} to {most}"
            )
    if isinstance(record.get("width"), int) and record["width"] % _GROUP:
        raise ValueError(f"width of the head is {record['width']}; it must be a multiple of {_GROUP}")
    if num_classes < 1 and record.get("type") != "depth":
        raise ValueError("the head has no classes")
    match record:
        case {"type": "classification", "pool": pool} if pool in _POOLS:
            return ClassHead(dim, num_classes, pool)
        case {"type": "segmentation", "width": int(width), "num_doublings": int(doublings)}:
            return MapHead(dim, num_classes, width, doublings)
        case {
            "type": "depth",
            "nearest": float(nearest),
            "farthest": float(farthest),
            "num_bins": None | int() as num_bins,
            "width": int(width),
            "num_doublings": int(doublings),
        } if 0 < nearest < farthest < math.inf:
            return DepthHead(dim, nearest, farthest, num_bins, width, doublings)
        case {
            "type": "detection",
            "num_queries": int(queries),
            "width": int(width),
            "num_layers": int(layers),
        }:
            return DetectionHead(dim, num_classes, queries, width, layers)
    kind = record.get("type")
    raise ValueError(f"this version knows no head of type {kind!r:.40} with these settings")


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
