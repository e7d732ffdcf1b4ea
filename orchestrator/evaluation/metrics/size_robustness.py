"""What features are worth at other sizes of photos than the model's own. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from orchestrator.data.large_arrays import taken
from orchestrator.evaluation.metric import LEAVE_ONE_OUT, Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.evaluation.metrics.knn import labelled, nearest


class SizeRobustness(Metric):
    """k-NN accuracy of test pictures seen smaller or larger, while the training pictures are seen as ever."""

    needs_labels: ClassVar[bool] = True

    scales: tuple[Annotated[float, Field(gt=0, le=8)], ...] = Field(
        (0.5, 1.0, 2.0),
        min_length=1,
        description="The sizes of the photos, as multiples of the model's size.",
    )
    k: int = Field(5, ge=1, description="The number of nearest neighbours that vote, each with one vote.")

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`accuracy_at_SCALEx` for each scale that the model takes."""
        assert features.at_scale is not None, "`evaluate` gives it"
        rows = labelled(features)
        split = LEAVE_ONE_OUT if LEAVE_ONE_OUT in rows else "test"
        bank, asked = rows.get("train", rows[split]), rows[split]
        _, class_of_N = np.unique([str(label) for label in features.labels], return_inverse=True)
        found = {}
        for scale in self.scales:
            seen_ND = features.cls_ND if scale == 1 else features.at_scale(scale)
            if seen_ND is None:
                continue
            near = nearest(
                taken(features.cls_ND, bank), taken(seen_ND, asked), self.k, others=split == LEAVE_ONE_OUT
            )
            hits = near.vote(class_of_N[bank], self.k) == class_of_N[asked]
            found[f"accuracy_at_{scale:g}x"] = mean(hits, split, features.seed, f"k={self.k}")
        return found
