"""Losses of fine-tuning on labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothed_cross_entropy(
    logits_BC: Tensor, classes_B: Tensor, weights_B: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy with label smoothing (arXiv 1512.00567, section 7), a mean over the rows with their weights.

    The target of a row is 1 - smoothing for its class, and smoothing / C is added to every class. Computed in float32.

    Args:
        logits_BC: of C classes.
        classes_B: int64.
        weights_B: the mean is of weight · loss over all B rows. Rows that only pad have 0.
        smoothing: from 0 to 1.

    Returns:
        The loss, ().
    """
    wide = torch.promote_types(logits_BC.dtype, torch.float32)
    loss_B = F.cross_entropy(logits_BC.to(wide), classes_B, reduction="none", label_smoothing=smoothing)
    return (loss_B * weights_B).mean()
