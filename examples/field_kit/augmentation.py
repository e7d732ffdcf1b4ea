"""An augmentation: photos that have no up and down, such as those of microscopes and satellites, are turned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

import orchestrator


class QuarterTurn(orchestrator.Augmentation):
    """Turns a view by 90, 180 or 270 degrees."""

    probability: float = Field(0.75, ge=0, le=1, description="The share of the views that are turned.")

    def apply(self, pixels_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Views are square, so the shape stays."""
        if rng.random() >= self.probability:
            return pixels_HWC
        return np.ascontiguousarray(np.rot90(pixels_HWC, k=int(rng.integers(1, 4))))
