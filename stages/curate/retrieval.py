"""Retrieval from seed sets: settings of `curate`, and which photos are near to those of the seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from orchestrator.config.settings import Settings
from orchestrator.errors import KeyMistakeError, UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.data.curation.block_workers import BlockWorkers
    from orchestrator.data.curation.selection import ImageStatus
    from orchestrator.data.curation.vectors import Vectors


def _one_or_several(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


class SeedRetrieval(Settings):
    """Images that are near to those of a seed set."""

    seeds: str = Field(
        min_length=1, description="The dataset whose images are the seeds, one of those in `data`."
    )
    per_seed: int = Field(
        4,
        ge=1,
        le=10_000,
        description="The number of images that are taken for each seed: the nearest ones by `embedding` among those of "
        "all datasets that are not seed sets.",
    )


Retrievals = Annotated[
    tuple[SeedRetrieval, ...],
    BeforeValidator(_one_or_several, json_schema_input_type=SeedRetrieval | tuple[SeedRetrieval, ...]),
]


def check_seeds(retrieve: Sequence[SeedRetrieval], data: Sequence[str]) -> None:
    """Raises KeyMistakeError for seed sets that are not datasets of the stage, or leave nothing to retrieve from."""
    names = [one.seeds for one in retrieve]
    for at, name in enumerate(names):
        if name not in data:
            close = nearest(name, data)
            raise KeyMistakeError(
                f"the seed set {name!r} is not among `data`",
                key="retrieve",
                hint=f"did you mean {close!r}?" if close else f"add {name!r} to `data`",
            )
        if name in names[:at]:
            raise KeyMistakeError(
                f"the seed set {name!r} is given twice", key="retrieve", hint="leave one of them out"
            )
    if names and not set(data) - set(names):
        raise KeyMistakeError(
            "all datasets are seed sets, so that there is nothing to retrieve from",
            key="retrieve",
            hint="add the dataset to retrieve from to `data`",
        )


def find_near(
    stage: str,
    retrieve: Sequence[SeedRetrieval],
    statuses: Sequence[ImageStatus],
    vectors: Vectors,
    holdout: float,
    workers: BlockWorkers | None,
    stop: Callable[[], None],
) -> tuple[NDArray[np.bool_], list[dict[str, Any]]]:
    """Which unique photos are near to a seed set, and what the report says of each seed set.

    Args:
        stage: its name.
        retrieve: the seed sets.
        statuses: of all photos.
        vectors: of the unique ones.
        holdout: the share that is held out: these are neither seeds nor retrieved.
        workers, stop: see :func:`orchestrator.data.curation.retrieval.nearest_of_pool`.

    Raises:
        UserError: a seed set, or the rest, has no photos.
    """
    import numpy as np

    from orchestrator.data.curation.retrieval import nearest_of_pool
    from orchestrator.data.curation.selection import is_held_out

    kept = [status.photo for status in statuses if status.status == "unique"]
    drawn = np.array([not is_held_out(photo.sha256, holdout) for photo in kept])
    sources = np.array([photo.source for photo in kept])
    pool = np.flatnonzero(~np.isin(sources, [one.seeds for one in retrieve]) & drawn)
    found, told = np.zeros(len(kept), np.bool_), []
    for one in retrieve:
        seeds = np.flatnonzero((sources == one.seeds) & drawn)
        if not len(seeds) or not len(pool):
            what = f"the seed set {one.seeds!r} has no images" if not len(seeds) else "there are no images"
            raise UserError(
                f"{what} {'of its own' if not len(seeds) else 'to retrieve from'}",
                where=f"stages.{stage}.retrieve",
                hint="of equal images the one of the dataset that `data` names first is kept",
            )
        rows = np.unique(nearest_of_pool(vectors, seeds, pool, one.per_seed, workers, stop))
        found[rows] = True
        told.append({"seeds": one.seeds, "per_seed": one.per_seed, "of": len(seeds), "photos": len(rows)})
    return found, told
