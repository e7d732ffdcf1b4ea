"""What is said of k-NN while a backbone trains: on how many photos, how often, and with how many neighbours."""

from __future__ import annotations

from pydantic import Field

from orchestrator.config.settings import Settings


class KnnProbe(Settings):
    """Computes the k-NN accuracy of the EMA backbone before the first step, at intervals, and after the last step.

    The photos are held-out ones, if at least 50 of them have labels that others have, too; else photos of the whole
    index with such labels, which self-supervised training does not see. Without labels each photo is seen in two
    parts, and what is counted is how often the nearest part is of the same photo.
    """

    every: int = Field(200, ge=1, description="The interval between evaluations of k-NN, in steps.")
    photos: int = Field(
        1000,
        ge=10,
        le=100_000,
        description="The maximum number of photos. They are the same each time, decoded once and kept in memory.",
    )
    k: int = Field(5, ge=1, description="The number of neighbours that vote. It is 1 without labels.")
