"""Image-level self-distillation (DINO, arXiv 2104.14294; DINOv3, arXiv 2508.10104, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.objectives.precision import work_dtype


def cross_entropy(student_logits_NK: Tensor, targets_NK: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy between target probabilities and the student's softmax, per row, in at least float32.

    Written as logsumexp minus inner product, so that no N×K log-probabilities are kept for the backward pass.

    Args:
        student_logits_NK: (..., K), any float dtype, K ≥ 1.
        targets_NK: (..., K), broadcastable to the logits; rows need not sum to 1.
        temperature: the student temperature.

    Returns:
        (...,), float32 (float64 for float64 logits).
    """
    # Softmax does not see a shift, but float32 does: at logits of 1e4 it has no digits left for their differences.
    top_N1 = student_logits_NK.detach().amax(dim=-1, keepdim=True).to(work_dtype(student_logits_NK))
    scaled_NK = (student_logits_NK - top_N1).div_(temperature)
    weighted_N = (targets_NK * scaled_NK).sum(dim=-1)
    return torch.logsumexp(scaled_NK, dim=-1) * targets_NK.sum(dim=-1) - weighted_N


def dino_loss(
    student_logits_VBK: Tensor, targets_TBK: Tensor, skip_same: bool = True, temperature: float = 0.1
) -> Tensor:
    """Mean cross-entropy over images and over pairs of a student view and a teacher view.

    Args:
        student_logits_VBK: V student views of B images.
        targets_TBK: teacher targets of T views of the same images.
        skip_same: leave out pairs with v == t: for global against global crops, where both are the same crop.
        temperature: the student temperature.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        ValueError: no pair is left.
    """
    num_views, num_targets = len(student_logits_VBK), len(targets_TBK)
    num_pairs = num_views * num_targets - (min(num_views, num_targets) if skip_same else 0)
    if num_pairs == 0:
        raise ValueError(f"no pair of {num_views} student and {num_targets} teacher views to compare")
    # Cross-entropy is linear in the targets: one pass per student view does for all its teacher views.
    total = student_logits_VBK.new_zeros((), dtype=work_dtype(student_logits_VBK))
    for view in range(num_views):
        partners = [t for t in range(num_targets) if not (skip_same and t == view)]
        if partners:
            mixed_BK = targets_TBK[partners].sum(dim=0)
            total = total + cross_entropy(student_logits_VBK[view], mixed_BK, temperature).mean()
    return total / num_pairs
