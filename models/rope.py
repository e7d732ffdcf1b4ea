"""Axial rotary position embedding of patches (arXiv 2104.09864; DINOv3, arXiv 2508.10104, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def axial_angles(grid_h: int, grid_w: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Rotation angles of every patch of a grid, in radians.

    Patch centres are normalised per axis to [-1, 1]; frequency k of an axis has period base^(4k / head_dim),
    and the angle is 2π · coordinate / period. Rows take the first half of the channels, columns the second.

    Returns:
        fp32 (grid_h * grid_w, head_dim / 2), patches in row-major order.
    """
    assert head_dim % 4 == 0, head_dim
    rows_H = (torch.arange(grid_h, device=device, dtype=torch.float32) + 0.5) / grid_h * 2 - 1
    columns_W = (torch.arange(grid_w, device=device, dtype=torch.float32) + 0.5) / grid_w * 2 - 1
    exponents_K = torch.arange(head_dim // 4, device=device, dtype=torch.float32) * (4 / head_dim)
    frequencies_K = 2 * math.pi * base**-exponents_K
    angles_HWK = (rows_H[:, None] * frequencies_K)[:, None].expand(-1, grid_w, -1)
    angles_WHK = (columns_W[:, None] * frequencies_K)[None].expand(grid_h, -1, -1)
    return torch.cat([angles_HWK, angles_WHK], dim=-1).reshape(grid_h * grid_w, head_dim // 2)


def rotation(angles_PK: Tensor, num_prefix: int, rescale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (num_prefix + P, K), with the identity rotation for the prefix tokens.

    `rescale` multiplies all coordinates: the box jitter of DINOv3. Angles are linear in the coordinates, so
    one table of angles serves every rescale.
    """
    prefix_K = angles_PK.new_zeros(num_prefix, angles_PK.shape[-1])
    angles_NK = torch.cat([prefix_K, angles_PK * rescale])
    return angles_NK.cos(), angles_NK.sin()


def rotate(x_BHND: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """Rotates the pairs (channel k, channel k + D/2) of queries or keys; at least fp32 inside, dtype kept."""
    work = torch.promote_types(x_BHND.dtype, torch.float32)
    first, second = x_BHND.to(work).chunk(2, dim=-1)
    rotated = torch.cat([first * cos_NK - second * sin_NK, second * cos_NK + first * sin_NK], dim=-1)
    return rotated.to(x_BHND.dtype)


def log_uniform_rescales(num: int, limit: float, generator: torch.Generator) -> list[float]:
    """`num` independent draws, log-uniform in [1 / limit, limit]."""
    uniform = torch.rand(num, generator=generator, device=generator.device, dtype=torch.float64)
    return torch.exp((2 * uniform - 1) * math.log(limit)).tolist()
