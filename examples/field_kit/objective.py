"""An objective: no dimension of the features may collapse (the variance term of VICReg, arXiv 2105.04906)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

import orchestrator

if TYPE_CHECKING:
    from torch import Tensor


class Variance(orchestrator.Objective):
    """A hinge on the standard deviation of each dimension over the images of a block."""

    target: float = Field(
        1.0, gt=0, le=1000, description="The standard deviation from which on there is no loss."
    )

    def loss(self, output: orchestrator.StudentOutput) -> Tensor:
        """The mean over crops and dimensions of what is missing to the target."""
        std_GD = (output.cls_GBD.float().var(dim=1) + 1e-4).sqrt()
        return (self.target - std_GD).relu().mean()
