"""Feature matching, for teachers without DINO and iBOT heads (AM-RADIO, arXiv 2312.06709)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from orchestrator.objectives.precision import widened


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
