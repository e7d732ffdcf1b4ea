"""Feature matching, for teachers without DINO and iBOT heads (AM-RADIO, arXiv 2312.06709)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from orchestrator.objectives.precision import widened

Grid = tuple[int, int]


def feature_loss(student_ND: Tensor, teacher_ND: Tensor, cosine_weight: float = 0.9) -> Tensor:
    """cosine_weight · (1 − cosine) + (1 − cosine_weight) · smooth-L1, mean over rows.

    The cosine carries the direction; the smooth-L1 part keeps the scale, which dense tasks read as well.

    Args:
        student_ND: student features, projected to the teacher's size by the caller.
        teacher_ND: teacher features of the same tokens; gets no gradient.
        cosine_weight: 0 to 1; 0.9 in AM-RADIO.

    Returns:
        Scalar, float32 (float64 for float64 features).
    """
    student_ND, teacher_ND = widened(student_ND), widened(teacher_ND.detach())
    cosine_distance = 1 - cosine_similarity(student_ND, teacher_ND, dim=-1).mean()
    return cosine_weight * cosine_distance + (1 - cosine_weight) * smooth_l1_loss(student_ND, teacher_ND)


def common_grid(first: Grid, second: Grid) -> Grid:
    """Where two maps of the same picture are compared: the coarser of both, along each axis.

    A finer map averaged down says what the coarser one can; a coarser one blown up would ask the other for detail
    that is only interpolated.
    """
    return min(first[0], second[0]), min(first[1], second[1])


def resize_tokens(tokens_BPD: Tensor, grid: Grid, wanted: Grid) -> Tensor:
    """Tokens (B, P, D) of a grid on another one: bilinear, antialiased, so that every cell counts; differentiable."""
    if grid == wanted:
        return tokens_BPD
    maps_BDHW = widened(tokens_BPD).transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(maps_BDHW, wanted, mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).transpose(1, 2).to(tokens_BPD.dtype)
