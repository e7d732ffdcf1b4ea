"""Gram anchoring (DINOv3, arXiv 2508.10104, section 4, equation 2).

The paper writes a squared Frobenius norm; here it is divided by the P² entries, as in the published training
code: the weight of the loss then does not depend on the resolution.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import mse_loss, normalize

from orchestrator.objectives.precision import widened

GramForm = Literal["auto", "patches", "features"]

# Five products of P·D² against four of P²·D break even at 1.25; from here on the D×D form is surely faster.
_FEATURES_FORM_FROM = 1.67


def gram_loss(
    student_BPD: Tensor, teacher_BPD: Tensor, *, form: GramForm = "auto", clip_negatives: bool = False
) -> Tensor:
    """Mean squared difference between the two Gram matrices of L2-normalised patch features, image by image.

    Args:
        student_BPD: student patch features of the global crops.
        teacher_BPD: Gram teacher's features on the same grid; gets no gradient. Its D may differ from the
            student's in the "patches" form only.
        form: "patches" builds the P×P matrices, "features" gets the same value and gradient from D×D ones,
            "auto" takes the faster.
        clip_negatives: set negative similarities of both to 0 first; needs the "patches" form.

    Returns:
        Scalar, float32 (float64 for float64 features): mean over images and the P² pairs of patches.

    Raises:
        ValueError: the shapes do not fit, or `clip_negatives` with the "features" form.
    """
    if student_BPD.shape[:2] != teacher_BPD.shape[:2]:
        raise ValueError(f"grids differ: {tuple(student_BPD.shape[:2])} and {tuple(teacher_BPD.shape[:2])}")
    if _form(student_BPD, teacher_BPD, form, clip_negatives) == "features":
        loss = _features_form
    elif clip_negatives:
        loss = _clipped_patches_form
    else:
        loss = _patches_form
    with torch.autocast(student_BPD.device.type, enabled=False):
        student_BPD = normalize(widened(student_BPD), dim=-1)
        teacher_BPD = normalize(widened(teacher_BPD.detach()), dim=-1)
        return loss(student_BPD, teacher_BPD)


def _form(student_BPD: Tensor, teacher_BPD: Tensor, form: GramForm, clip_negatives: bool) -> GramForm:
    same_dim = student_BPD.shape[2] == teacher_BPD.shape[2]
    if form == "features" and clip_negatives:
        raise ValueError("clip_negatives needs the P×P matrices: form='patches'")
    if form == "features" and not same_dim:
        raise ValueError(f"feature sizes differ: {student_BPD.shape[2]} and {teacher_BPD.shape[2]}")
    if form != "auto":
        return form
    many_patches = student_BPD.shape[1] > _FEATURES_FORM_FROM * student_BPD.shape[2]
    return "features" if many_patches and same_dim and not clip_negatives else "patches"


def _patches_form(student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    return mse_loss(student_BPD @ student_BPD.mT, teacher_BPD @ teacher_BPD.mT)


def _clipped_patches_form(student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    return mse_loss((student_BPD @ student_BPD.mT).relu(), (teacher_BPD @ teacher_BPD.mT).relu())


def _features_form(student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    loss: Tensor = _FeaturesGram.apply(student_BPD, teacher_BPD)  # type: ignore[no-untyped-call]
    return loss


class _FeaturesGram(torch.autograd.Function):
    """‖XXᵀ − YYᵀ‖² / (B·P²) from D×D matrices.

    With Δ = X − Y and S = X + Y, XXᵀ − YYᵀ = (ΔSᵀ + SΔᵀ)/2, so the squared norm is (tr ΔᵀΔSᵀS + tr ΔᵀSΔᵀS)/2.
    Unlike ‖XᵀX‖² + ‖YᵀY‖² − 2‖XᵀY‖² this is not a small difference of large numbers when student and teacher
    agree, and by hand the backward pass takes two products with the D×D matrices instead of six.
    """

    @staticmethod
    def forward(ctx: Any, student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
        delta_BPD, total_BPD = student_BPD - teacher_BPD, student_BPD + teacher_BPD
        delta_delta_BDD = delta_BPD.mT @ delta_BPD
        total_total_BDD = total_BPD.mT @ total_BPD
        delta_total_BDD = delta_BPD.mT @ total_BPD
        ctx.save_for_backward(delta_BPD, total_BPD, delta_delta_BDD, total_total_BDD, delta_total_BDD)
        squared_norms_BDD = delta_delta_BDD * total_total_BDD + delta_total_BDD * delta_total_BDD.mT
        return squared_norms_BDD.sum() / (2 * _num_entries(student_BPD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        delta_BPD, total_BPD, delta_delta_BDD, total_total_BDD, delta_total_BDD = ctx.saved_tensors
        # d‖XXᵀ − YYᵀ‖²/dX = 4(XXᵀ − YYᵀ)X = Δ(SᵀS + SᵀΔ) + S(ΔᵀS + ΔᵀΔ), as X = (S + Δ)/2.
        grad_BPD = delta_BPD @ (total_total_BDD + delta_total_BDD.mT)
        grad_BPD += total_BPD @ (delta_total_BDD + delta_delta_BDD)
        return grad_BPD * (grad / _num_entries(delta_BPD)), None


def _num_entries(features_BPD: Tensor) -> int:
    return features_BPD.shape[0] * features_BPD.shape[1] ** 2
