"""A metric: how many dimensions the features of a model use (RankMe, arXiv 2210.02885)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

import orchestrator


class EffectiveRank(orchestrator.Metric):
    """The exponential of the entropy of the singular values of the CLS features."""

    centre: bool = Field(True, description="Whether the mean feature is taken away first.")

    def measure(self, features: orchestrator.Features) -> Mapping[str, float]:
        """Between 1, for features that are all on one line, and the width of the features."""
        rows_ND = features.cls_ND.astype(np.float64)
        if self.centre:
            rows_ND = rows_ND - rows_ND.mean(axis=0)
        values = np.linalg.svd(rows_ND, compute_uv=False)
        shares = values / max(values.sum(), 1e-12)
        rank = float(np.exp(-(shares * np.log(shares + 1e-12)).sum()))
        return {"rank": rank, "share": rank / rows_ND.shape[1]}
