"""The objectives as their papers write them: loops over rows and pairs, in float64, nothing rearranged for speed.

Everything is differentiable, so that gradients can be compared too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    return torch.softmax(3 * randn(*shape, seed=seed), dim=-1)


def cross_entropy(student_K: Tensor, target_K: Tensor, temperature: float = 0.1) -> Tensor:
    """−Σ_k t_k · log softmax(s / temperature)_k."""
    logits_K = student_K.double() / temperature
    return -(target_K.double() * (logits_K - torch.logsumexp(logits_K, 0))).sum()


def dino(student_VBK: Tensor, targets_TBK: Tensor, skip_same: bool, temperature: float = 0.1) -> Tensor:
    terms = [
        cross_entropy(student_VBK[v, b], targets_TBK[t, b], temperature)
        for v in range(len(student_VBK))
        for t in range(len(targets_TBK))
        for b in range(student_VBK.shape[1])
        if not (skip_same and v == t)
    ]
    return torch.stack(terms).mean()


def ibot(
    student_MK: Tensor, targets_MK: Tensor, image_of_M: Tensor, num_crops: int, temperature: float = 0.1
) -> Tensor:
    total = student_MK.double().sum() * 0
    for crop in range(num_crops):
        tokens = [m for m, image in enumerate(image_of_M.tolist()) if image == crop]
        if tokens:
            terms = [cross_entropy(student_MK[m], targets_MK[m], temperature) for m in tokens]
            total = total + torch.stack(terms).mean()
    return total / num_crops


def koleo(cls_BD: Tensor, group_size: int = 16, eps: float = 1e-8) -> Tensor:
    terms = []
    for group in cls_BD.double().split(group_size):
        unit = [row / torch.linalg.vector_norm(row) for row in group]
        for i in range(len(unit)):
            distances = [torch.linalg.vector_norm(unit[i] - unit[j]) for j in range(len(unit)) if j != i]
            if distances:
                terms.append(-(torch.stack(distances).min() + eps).log())
    return torch.stack(terms).mean() if terms else cls_BD.double().sum() * 0


def gram(student_BPD: Tensor, teacher_BPD: Tensor, clip: bool = False) -> Tensor:
    """Entry by entry of the two P×P matrices."""
    entries = []
    for x, y in zip(student_BPD.double(), teacher_BPD.double(), strict=True):
        for i in range(len(x)):
            for j in range(len(x)):
                a = (x[i] @ x[j]) / (x[i].norm() * x[j].norm())
                b = (y[i] @ y[j]) / (y[i].norm() * y[j].norm())
                entries.append(((a.clamp_min(0) - b.clamp_min(0)) if clip else (a - b)) ** 2)
    return torch.stack(entries).mean()


def features(student_ND: Tensor, teacher_ND: Tensor, cosine_weight: float) -> Tensor:
    distances, gaps = [], []
    for s, t in zip(student_ND.double(), teacher_ND.double(), strict=True):
        distances.append(1 - (s @ t) / (s.norm() * t.norm()))
        gaps += [0.5 * gap * gap if gap.abs() < 1 else gap.abs() - 0.5 for gap in s - t]
    cosine, smooth = torch.stack(distances).mean(), torch.stack(gaps).mean()
    return cosine_weight * cosine + (1 - cosine_weight) * smooth


def sinkhorn(logits_NK: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """Textbook Sinkhorn-Knopp on the whole matrix: normalise columns, then rows; in log space."""
    log_q_NK = logits_NK.double() / temperature
    for _ in range(num_iterations):
        log_q_NK = log_q_NK - torch.logsumexp(log_q_NK, 0, keepdim=True)
        log_q_NK = log_q_NK - torch.logsumexp(log_q_NK, 1, keepdim=True)
    return log_q_NK.exp()
