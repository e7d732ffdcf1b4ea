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


def pixel_cross_entropy(logits_BCHW: Tensor, classes_BHW: Tensor, weights_B: Tensor) -> Tensor:
    """Cross-entropy of every pixel: for each image the mean over its pixels that count, then the mean over images.

    Computed in float32.

    Args:
        logits_BCHW: of C classes.
        classes_BHW: int64, -1 where a pixel does not count. An image in which none does adds 0.
        weights_B: the mean is of weight · loss over all B images.

    Returns:
        The loss, ().
    """
    wide = torch.promote_types(logits_BCHW.dtype, torch.float32)
    loss_BHW = F.cross_entropy(logits_BCHW.to(wide), classes_BHW, reduction="none", ignore_index=-1)
    counts_B = (classes_BHW >= 0).flatten(1).sum(dim=1).clamp(min=1)
    return (loss_BHW.flatten(1).sum(dim=1) / counts_B * weights_B).mean()


def scale_invariant_log(
    log_depth_BHW: Tensor, depth_BHW: Tensor, weights_B: Tensor, invariance: float = 0.5
) -> Tensor:
    """The scale-invariant error of log depth (Eigen et al., arXiv 1406.2283, equation 4), a mean over images.

    With d = ln(predicted) - ln(true) over the pixels that count: mean(d²) - invariance · mean(d)². Computed in float32.

    Args:
        log_depth_BHW: ln of the predicted depth in metres.
        depth_BHW: in metres, 0 where a pixel does not count. An image in which none does adds 0.
        weights_B: the mean is of weight · loss over all B images.
        invariance: 0 is the plain squared error; with 1 a factor on all depths of an image costs nothing.

    Returns:
        The loss, ().
    """
    there_BP = (depth_BHW > 0).flatten(1)
    wide = torch.promote_types(log_depth_BHW.dtype, torch.float32)
    # Where there is no depth a logarithm would have no gradient.
    true_BP = torch.where(there_BP, depth_BHW.flatten(1).to(wide), 1).log()
    d_BP = torch.where(there_BP, log_depth_BHW.flatten(1).to(wide) - true_BP, 0)
    counts_B = there_BP.sum(dim=1).clamp(min=1)
    mean_B, square_B = d_BP.sum(dim=1) / counts_B, d_BP.square().sum(dim=1) / counts_B
    return ((square_B - invariance * mean_B.square()) * weights_B).mean()
