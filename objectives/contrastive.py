"""Symmetric InfoNCE between images and captions (CLIP, arXiv 2103.00020, figure 3; LiT, arXiv 2111.07991)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


class Normalisers(NamedTuple):
    """Log softmax denominators of the global batch of N pairs (:func:`log_normaliser`), constants.

    Attributes:
        images: (N,), image n over all texts.
        texts: (N,), text n over all images.
    """

    images: Tensor
    texts: Tensor


def info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    scale: float | Tensor,
    *,
    all_image_ND: Tensor | None = None,
    all_text_ND: Tensor | None = None,
    offset: int = 0,
    normalisers: Normalisers | None = None,
) -> Tensor:
    """Symmetric InfoNCE of local pairs against the columns of the global batch.

    The mean over equal blocks is the loss of the global batch. Its gradient is right in three cases: no
    `all_*` (the batch is local); `all_*` from a gather that passes gradients back; or constant `all_*`
    together with `normalisers`. Constant columns alone lose what a pair's embeddings do as columns in the
    other rows; with the normalisers that part is added, from the B×N similarities that are there anyway.

    Args:
        image_BD, text_BD: embeddings of the local pairs; L2-normalised here.
        scale: the logit scale itself (1/temperature), not its logarithm.
        all_image_ND, all_text_ND: embeddings of the global batch, both or neither; L2-normalised here.
        offset: where the local pairs start in the global batch.
        normalisers: see above; needs `all_*`.

    Returns:
        Scalar, float32: mean over the B pairs and both directions.

    Raises:
        ValueError: only one of `all_*` is given, the local pairs do not fit at `offset`, or `normalisers`
            without `all_*`.
    """
    if (all_image_ND is None) != (all_text_ND is None):
        raise ValueError("give both all_image_ND and all_text_ND, or neither")
    if all_image_ND is None and normalisers is not None:
        raise ValueError("normalisers are for constant all_image_ND and all_text_ND")
    with torch.autocast(image_BD.device.type, enabled=False):
        image_BD, text_BD = _unit(image_BD), _unit(text_BD)
        columns_image_ND = image_BD if all_image_ND is None else _unit(all_image_ND)
        columns_text_ND = text_BD if all_text_ND is None else _unit(all_text_ND)
        if not 0 <= offset <= len(columns_text_ND) - len(image_BD):
            raise ValueError(f"{len(image_BD)} pairs at {offset} exceed a batch of {len(columns_text_ND)}")
        labels_B = torch.arange(offset, offset + len(image_BD), device=image_BD.device)
        cosine_image_BN = image_BD @ columns_text_ND.T
        cosine_text_BN = text_BD @ columns_image_ND.T
        loss = cross_entropy(scale * cosine_image_BN, labels_B)
        loss = (loss + cross_entropy(scale * cosine_text_BN, labels_B)) / 2
        if normalisers is not None:
            loss = loss + _as_columns(cosine_image_BN, scale, labels_B, normalisers.texts) / 2
            loss = loss + _as_columns(cosine_text_BN, scale, labels_B, normalisers.images) / 2
        return loss


@torch.no_grad()
def log_normaliser(rows_BD: Tensor, columns_ND: Tensor, scale: float | Tensor) -> Tensor:
    """log Σ_n exp(scale · cosine(row, column n)) of each row, (B,) float32."""
    with torch.autocast(rows_BD.device.type, enabled=False):
        return torch.logsumexp(scale * (_unit(rows_BD) @ _unit(columns_ND).T), dim=1)


def _as_columns(cosine_BN: Tensor, scale: float | Tensor, labels_B: Tensor, normaliser_N: Tensor) -> Tensor:
    """Zero, with the gradient of the local embeddings' part as columns in the other side's N rows.

    In row n, column b has the logit scale·cosine_bn and the gradient softmax_n(b) − [b is n's partner]. The
    scale gets its whole gradient from the rows, so it is a constant here.
    """
    constant_scale = scale.detach() if isinstance(scale, Tensor) else scale
    with torch.no_grad():
        gradient_BN = (constant_scale * cosine_BN - normaliser_N).exp()
        gradient_BN[torch.arange(len(labels_B), device=labels_B.device), labels_B] -= 1
    surrogate = constant_scale * (gradient_BN * cosine_BN).sum() / len(labels_B)
    return surrogate - surrogate.detach()


def _unit(embeddings: Tensor) -> Tensor:
    return normalize(embeddings.float(), dim=-1)
