"""The DINO and iBOT terms that pretraining and distillation share, from whole logits or chunk by chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.models.heads import Score
from orchestrator.objectives.chunked import SoftTargets, chunked_cross_entropy, chunked_sinkhorn_scaling
from orchestrator.objectives.dino import dino_loss
from orchestrator.objectives.ibot import ibot_loss
from orchestrator.objectives.sinkhorn import Reduce, sinkhorn_scaling, targets

TargetProbs = Tensor | SoftTargets
"""Target probabilities (T, N, K), whole or as what they are rebuilt from."""


def with_prototypes(code_NC: Tensor, prototypes_KC: Tensor) -> tuple[Tensor, Tensor]:
    """A score that hands the teacher's prototypes over, to be used outside of its forward until the step ends."""
    return code_NC, prototypes_KC.detach().clone()


def centred(
    rows: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    reduce: Reduce,
    prototypes_KC: Tensor | None = None,
    chunk_rows: int | None = None,
) -> list[TargetProbs]:
    """Sinkhorn-Knopp targets over the global batch of a step, for each of this worker's blocks.

    Args:
        rows: of each block the teacher's logits (T, N, K), or with `chunk_rows` its codes (T, N, C).
        weights: of the blocks: 0 leaves a padded one out.
        temperature: the teacher's.
        reduce: sum over workers.
        prototypes_KC: the teacher's, for codes.
        chunk_rows: None for whole logits.
    """
    flat = [block.flatten(0, 1) for block in rows]
    weights_N = torch.cat([r.new_full((len(r),), weight) for r, weight in zip(flat, weights, strict=True)])
    if chunk_rows is None:
        log_v_K = sinkhorn_scaling(torch.cat(flat), temperature, weights_N=weights_N, reduce=reduce)
        return [targets(block, temperature, log_v_K) for block in rows]
    assert prototypes_KC is not None
    log_v_K = chunked_sinkhorn_scaling(
        torch.cat(flat),
        prototypes_KC,
        temperature,
        chunk_rows=chunk_rows,
        weights_N=weights_N,
        lengths=[len(block) for block in flat],
        reduce=reduce,
    )
    return [SoftTargets(block, prototypes_KC, log_v_K, temperature) for block in rows]


@dataclass(frozen=True)
class Terms:
    """Weighted loss terms.

    Attributes:
        metrics: the terms by name.
        parts: tensors of the same sum as the terms, which carry its gradient.
    """

    metrics: dict[str, Tensor]
    parts: list[Tensor]


@dataclass(frozen=True)
class Distillation:
    """The DINO (global and local) and iBOT terms of one block.

    The DINO terms are weighted by their share of all view pairs, as in DINOv2 and DINOv3: with 2 globals and 8
    locals 16/18 for local against global and 2/18 for global against the other global.

    Attributes:
        dino: targets (G, B, K) of the global views.
        ibot: targets (1, M, K) of the masked tokens.
        tokens_M: flat indices of these, over (G·B, patches).
        num_patches: of a global view.
        num_views: global and local views of an image.
        temperature: the student's.
        chunk_rows: None for whole logits; what `dino` and `ibot` are must fit.
    """

    dino: TargetProbs
    ibot: TargetProbs
    tokens_M: Tensor
    num_patches: int
    num_views: int
    local_weight: float
    ibot_weight: float
    temperature: float
    chunk_rows: int | None = None

    def scores(self) -> dict[str, Score] | None:
        """What the student's heads make in the place of logits."""
        if self.chunk_rows is None:
            return None
        return {"dino": self._dino_score, "ibot": self._ibot_score}

    def terms(self, out: Mapping[str, Any]) -> Terms:
        """The terms, from what the student's heads made."""
        return self._plain(out) if self.chunk_rows is None else self._chunked(out)

    @property
    def _shape(self) -> tuple[int, int]:
        """Global views, and images of the block."""
        rows = self.dino.codes_TNC if isinstance(self.dino, SoftTargets) else self.dino
        return rows.shape[0], rows.shape[1]

    @property
    def _pairs(self) -> tuple[int, int]:
        """Local–global and global–global pairs of views."""
        num_globals, _ = self._shape
        return (self.num_views - num_globals) * num_globals, num_globals * (num_globals - 1)

    def _plain(self, out: Mapping[str, Tensor]) -> Terms:
        assert isinstance(self.dino, Tensor)
        assert isinstance(self.ibot, Tensor)
        num_globals, batch = self._shape
        local_pairs, global_pairs = self._pairs
        logits_VBK = out["dino"].unflatten(0, (self.num_views, batch))
        terms = {}
        if local_pairs:
            loss = dino_loss(
                logits_VBK[num_globals:], self.dino, skip_same=False, temperature=self.temperature
            )
            terms["dino_local"] = self.local_weight * local_pairs / sum(self._pairs) * loss
        if global_pairs:
            loss = dino_loss(logits_VBK[:num_globals], self.dino, temperature=self.temperature)
            terms["dino_global"] = global_pairs / sum(self._pairs) * loss
        crops_M = self.tokens_M // self.num_patches
        terms["ibot"] = self.ibot_weight * ibot_loss(
            out["ibot"], self.ibot[0], crops_M, num_globals * batch, temperature=self.temperature
        )
        return Terms(terms, list(terms.values()))

    def _chunked(self, out: Mapping[str, tuple[Tensor, Tensor]]) -> Terms:
        num_globals, _ = self._shape
        (dino, dino_VB), (ibot, _) = out["dino"], out["ibot"]
        weighted_VB = dino_VB * self._view_weights(dino_VB)
        local_pairs, global_pairs = self._pairs
        terms = {}
        if local_pairs:
            terms["dino_local"] = weighted_VB[num_globals:].sum()
        if global_pairs:
            terms["dino_global"] = weighted_VB[:num_globals].sum()
        return Terms({**terms, "ibot": ibot.detach()}, [dino, ibot])

    def _dino_score(self, codes_NC: Tensor, prototypes_KC: Tensor) -> tuple[Tensor, Tensor]:
        num_globals, batch = self._shape
        shares_VG = [[float(view != other) for other in range(num_globals)] for view in range(self.num_views)]
        return self._score(
            self.dino,
            codes_NC.unflatten(0, (-1, batch)),
            prototypes_KC,
            shares_VG,
            self._view_weights(codes_NC),
        )

    def _ibot_score(self, codes_MC: Tensor, prototypes_KC: Tensor) -> tuple[Tensor, Tensor]:
        num_globals, batch = self._shape
        crops_M = self.tokens_M // self.num_patches
        num_masked_C = torch.bincount(crops_M, minlength=num_globals * batch)
        weights_M = self.ibot_weight / (num_masked_C[crops_M] * (num_globals * batch))
        return self._score(self.ibot, codes_MC[None], prototypes_KC, [[1.0]], weights_M[None])

    def _score(
        self,
        wanted: TargetProbs,
        codes_RNC: Tensor,
        prototypes_KC: Tensor,
        shares_RT: list[list[float]],
        weights_RN: Tensor,
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(wanted, SoftTargets)
        assert self.chunk_rows is not None
        return chunked_cross_entropy(
            codes_RNC,
            prototypes_KC,
            wanted,
            shares_RT,
            weights_RN,
            temperature=self.temperature,
            chunk_rows=self.chunk_rows,
        )

    def _view_weights(self, like: Tensor) -> Tensor:
        """(V, 1): what one image of one view counts, so that each pair of views counts the same."""
        num_globals, batch = self._shape
        weights_V1 = torch.ones(self.num_views, 1, device=like.device)
        weights_V1[num_globals:] = self.local_weight
        return weights_V1 / (max(1, sum(self._pairs)) * batch)
