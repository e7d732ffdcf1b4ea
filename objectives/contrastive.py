"""Symmetric InfoNCE between images and captions over a global batch that no worker holds.

CLIP (arXiv 2103.00020, figure 3); LiT (arXiv 2111.07991). Workers pass their embeddings round a ring, so memory
is linear in the local batch whatever the global one is. One turn finds the softmax denominators, a second one
the gradients, which are linear in them; a block's backward then follows from constants (:func:`info_nce`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.objectives.precision import widened

# One worker's rows → every worker's rows, one worker after the other, the own ones first. A ring is called and
# used up the same number of times on every worker; rows may differ in number, not in width.
Ring = Callable[[Tensor], Iterable[Tensor]]

# Columns compared with all local rows at a time.
_CHUNK = 1024


def alone(rows: Tensor) -> Iterable[Tensor]:
    """The :data:`Ring` of a single worker."""
    return (rows,)


class Contrast(NamedTuple):
    """What :func:`contrast` finds for B local pairs; constants.

    Attributes:
        loss_B: cross-entropy of each pair, the mean of both directions; its mean over all pairs is the loss.
        image_BD, text_BD: gradient of the sum of all workers' losses by the local L2-normalised embeddings.
        scale_B: each pair's own part of the gradient by the scale.
        hit_B: share of the two directions in which a pair's partner is nearer than anything else.
    """

    loss_B: Tensor
    image_BD: Tensor
    text_BD: Tensor
    scale_B: Tensor
    hit_B: Tensor

    def rows(self, start: int, stop: int) -> Contrast:
        """The pairs from `start` to before `stop`."""
        return Contrast(*(part[start:stop] for part in self))


@torch.no_grad()
def contrast(image_BD: Tensor, text_BD: Tensor, scale: Tensor | float, ring: Ring = alone) -> Contrast:
    """Loss and gradients of the local pairs in the global batch of N pairs, in O(B·(D + chunk)) memory.

    With p_ij and q_ij the softmax of scale·<image_i, text_j> over j and over i, image i has the gradient
    scale/2 · (Σ_j (p_ij + q_ij)·text_j − 2·text_i); a text has the same with the roles exchanged.

    Args:
        image_BD, text_BD: embeddings of the local pairs, B may be 0; L2-normalised here.
        scale: the logit scale itself (1/temperature), the same on every worker.
        ring: passes rows from worker to worker.

    Raises:
        ValueError: the numbers of images and texts differ.
    """
    if image_BD.shape != text_BD.shape:
        raise ValueError(f"images {tuple(image_BD.shape)} and texts {tuple(text_BD.shape)} are not pairs")
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = _unit(image_BD), _unit(text_BD)
        scale = torch.as_tensor(scale, dtype=image_BD.dtype, device=image_BD.device)
        first = _Denominators(image_BD, scale), _Denominators(text_BD, scale)
        for index, part in enumerate(ring(torch.cat([image_BD, text_BD], dim=1))):
            columns_image_CD, columns_text_CD = part.chunk(2, dim=1)
            first[0].add(columns_text_CD, own=index == 0)
            first[1].add(columns_image_CD, own=index == 0)
        log_sums_B2 = torch.stack([side.log_sums() for side in first], dim=1)
        second = (
            _ContrastGradients(image_BD, log_sums_B2[:, 0], scale),
            _ContrastGradients(text_BD, log_sums_B2[:, 1], scale),
        )
        for part in ring(torch.cat([image_BD, text_BD, log_sums_B2], dim=1)):
            columns, (column_image_C, column_text_C) = part[:, :-2], part[:, -2:].unbind(1)
            columns_image_CD, columns_text_CD = columns.chunk(2, dim=1)
            second[0].add(columns_text_CD, column_text_C)
            second[1].add(columns_image_CD, column_image_C)
    partner_B = (image_BD * text_BD).sum(1)
    return Contrast(
        loss_B=log_sums_B2.mean(1) - scale * partner_B,
        image_BD=scale * (second[0].sum_BD / 2 - text_BD),
        text_BD=scale * (second[1].sum_BD / 2 - image_BD),
        scale_B=(second[0].cosine_B + second[1].cosine_B) / 2 - partner_B,
        hit_B=torch.stack([side.hits() for side in first]).mean(0),
    )


def info_nce(image_BD: Tensor, text_BD: Tensor, scale: Tensor, found: Contrast) -> Tensor:
    """The mean loss of B pairs, with the gradient that they have in the global batch.

    The mean over equal blocks of pairs, on whichever workers, is the loss of the global batch; so is its
    gradient.

    Args:
        image_BD, text_BD: the embeddings again, now with a graph behind them; L2-normalised here.
        scale: the logit scale, likewise.
        found: what :func:`contrast` found for these pairs.

    Returns:
        Scalar, at least float32.
    """
    with torch.autocast(image_BD.device.type, enabled=False):
        surrogate_B = (_unit(image_BD) * found.image_BD).sum(1) + (_unit(text_BD) * found.text_BD).sum(1)
        surrogate = surrogate_B.mean() + scale * found.scale_B.mean()
        # The value is the loss; the surrogate, zero in value, only brings the gradient.
        return found.loss_B.mean() + (surrogate - surrogate.detach())


class _Denominators:
    """Streaming log Σ_n exp(scale · cosine(row, column n)) of each row, and whether its partner is nearest."""

    def __init__(self, rows_BD: Tensor, scale: Tensor) -> None:
        self._rows_BD, self._scale = rows_BD, scale
        never = torch.full_like(rows_BD[:, 0], -torch.inf)
        # Hundreds of parts are added up; in float32 each would cost a rounding.
        self._log_sum_B = never.double()
        self._partner_B, self._rival_B = never.clone(), never.clone()

    def add(self, columns_CD: Tensor, *, own: bool) -> None:
        """The next columns; `own` ones are the rows' partners, one by one."""
        for start, chunk_CD in _chunks(columns_CD):
            cosine_BC = self._rows_BD @ chunk_CD.T
            log_sum_B = torch.logsumexp(self._scale * cosine_BC, dim=1)
            self._log_sum_B = torch.logaddexp(self._log_sum_B, log_sum_B.double())
            if own:
                partners = slice(start, start + len(chunk_CD))
                diagonal_C = cosine_BC[partners].diagonal()
                self._partner_B[partners] = diagonal_C
                diagonal_C.fill_(-torch.inf)
            self._rival_B = torch.maximum(self._rival_B, cosine_BC.amax(dim=1))

    def log_sums(self) -> Tensor:
        return self._log_sum_B.to(self._rows_BD.dtype)

    def hits(self) -> Tensor:
        # Strictly: collapsed embeddings, all alike, hit nothing.
        return (self._partner_B > self._rival_B).to(self._rows_BD.dtype)


class _ContrastGradients:
    """Streaming Σ_n (row's softmax + column n's softmax)·column n, and the row's mean cosine."""

    def __init__(self, rows_BD: Tensor, log_sum_B: Tensor, scale: Tensor) -> None:
        self._rows_BD, self._log_sum_B, self._scale = rows_BD, log_sum_B, scale
        self.sum_BD = torch.zeros_like(rows_BD)
        self.cosine_B = torch.zeros_like(log_sum_B)

    def add(self, columns_CD: Tensor, log_sum_C: Tensor) -> None:
        """The next columns, with their own denominators over all rows."""
        for start, chunk_CD in _chunks(columns_CD):
            cosine_BC = self._rows_BD @ chunk_CD.T
            logits_BC = self._scale * cosine_BC
            as_row_BC = (logits_BC - self._log_sum_B[:, None]).exp()
            self.cosine_B += (as_row_BC * cosine_BC).sum(1)
            as_column_BC = (logits_BC - log_sum_C[start : start + len(chunk_CD)]).exp()
            self.sum_BD += (as_row_BC + as_column_BC) @ chunk_CD


def _chunks(columns_CD: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(columns_CD), _CHUNK):
        yield start, columns_CD[start : start + _CHUNK]


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(widened(embeddings), dim=-1)
