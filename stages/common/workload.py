"""What a job computes and holds: the terms in which `stages/compute_cost.py` describes the training stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kept = Literal["trained", "ema", "frozen"]


@dataclass(frozen=True)
class Net:
    """A network that takes part in a step.

    Attributes:
        kept: `trained` has gradients and moments, `ema` an fp32 average and the copy that computes, `frozen` weights.
        unit: parameters of the largest part that ZeRO-3 fetches at once.
        depth, dim: of the tower whose activations a backward pass needs; 0 where there is none.
        tokens: of one image's views, through the tower.
        width: hidden width of a block's feed-forward over `dim`.
        activation_bytes: of one image, that a backward pass needs, where they were counted. None: they follow from
            the above.
    """

    name: str
    kept: Kept
    params: int
    unit: int
    depth: int = 0
    dim: int = 0
    tokens: int = 0
    width: float = 4.0
    activation_bytes: float | None = None


@dataclass(frozen=True)
class Workload:
    """One job: a stage, a student of one, or the teacher they share.

    Attributes:
        name: `stage` or `stage/student`.
        block_size: images that go forward and backward at once.
        flops: operations an image, by part.
        logits: of an image's student and teacher rows, each times its prototypes.
        largest_row: prototypes of the wider head.
    """

    name: str
    steps: int
    batch_size: int
    block_size: int
    nets: tuple[Net, ...]
    flops: Mapping[str, float]
    logits: tuple[float, float] = (0.0, 0.0)
    largest_row: int = 0

    @property
    def flops_per_image(self) -> float:
        """All parts together."""
        return sum(self.flops.values())

    @property
    def total_flops(self) -> float:
        """Of all steps."""
        return self.flops_per_image * self.batch_size * self.steps
