"""Patch-level self-distillation on masked patches (iBOT, arXiv 2111.07832, equation 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.objectives.dino import cross_entropy


def ibot_loss(
    student_logits_MK: Tensor,
    targets_MK: Tensor,
    image_of_M: Tensor,
    num_crops: int,
    temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy on masked tokens: the mean within each crop, summed, divided by all crops.

    Crops without a mask count in the divisor, as in DINOv2 and DINOv3; half of the crops are unmasked there.

    Args:
        student_logits_MK: student logits of the M masked tokens of all crops; M may be 0.
        targets_MK: teacher targets of the same tokens, unmasked.
        image_of_M: int64, the crop of each token, 0 ≤ image_of_M < num_crops.
        num_crops: all global crops, masked or not (2B for two globals).
        temperature: the student temperature.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    losses_M = cross_entropy(student_logits_MK, targets_MK, temperature)
    num_masked_C = torch.bincount(image_of_M, minlength=num_crops)
    return (losses_M / num_masked_C[image_of_M]).sum() / num_crops
