"""The steps of a curation: scan, leave out repeats, embed, cluster and draw, and write the index and what it holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.bands import mean_and_std
from orchestrator.data.curation import selection
from orchestrator.data.curation.contact_sheet import draw_clusters
from orchestrator.data.curation.dedup import NearLimit
from orchestrator.data.curation.hierarchy import Hierarchy, cluster_levels, draw
from orchestrator.data.curation.selection import ImageStatus
from orchestrator.data.curation.vectors import ArrayVectors, Vectors
from orchestrator.data.index import ImageIndex
from orchestrator.errors import Stopped, UserError, shortened
from orchestrator.progress import Meter
from orchestrator.stages.base import Context
from orchestrator.stages.curate.report import (
    accounts_of,
    log_first,
    report_of,
    show_account,
    write_provenance,
)
from orchestrator.stages.curate.retrieval import find_near
from orchestrator.stages.curate.scan import Scanned, scan_sources
from orchestrator.stages.curate.workers import block_workers

if TYPE_CHECKING:
    from orchestrator.config.pixels import PixelFormat
    from orchestrator.stages.curate.config import Curate

logger = logging.getLogger("orchestrator")

# Characters of a warning about near duplicates.
_WARNING = 900
# Figures of the report that the stage returns.
_SUMMARY = ("images", "unique", "corrupt", "duplicates", "left_out", "clusters")


class _Filtered(NamedTuple):
    """Photos without repeats.

    Attributes:
        statuses: what became of each photo, in the order of the scan.
        descriptors: float32, a row per unique photo.
        near: of each dataset, the limit up to which two pictures are near duplicates.
        moments: float64, sums of the unique photos' pixels, where mean and deviation are measured.
    """

    statuses: list[ImageStatus]
    descriptors: NDArray[np.float32]
    near: list[NearLimit]
    moments: list[NDArray[np.float64]]


class _Drawn(NamedTuple):
    """What is drawn of the unique photos.

    Attributes:
        levels: the hierarchy of clusters.
        clusters: a row per unique photo, its cluster at each level, finest first.
        balanced: whether a photo is in the balanced component.
        retrieved: whether a photo is near to a seed set.
        retrieval: what the report says of each seed set.
    """

    levels: Hierarchy
    clusters: NDArray[np.int64]
    balanced: NDArray[np.bool_]
    retrieved: NDArray[np.bool_]
    retrieval: list[dict[str, Any]]


def run_curation(config: Curate, context: Context) -> dict[str, float]:
    """Run all steps; the figures are those of :meth:`Curate.run`, which names the errors, too."""
    scanned = scan_sources(context, config.data)
    _stop_if_asked(context)
    filtered = _without_repeats(config, context, scanned)
    vectors, statuses = _vectors(config, context, filtered)
    target = _target(config, vectors.shape[0], context.name)
    if isinstance(config.embedding, str):
        np.save(context.out / "embeddings.npy", filtered.descriptors)
    drawn = _drawn(config, context, vectors, statuses, target)
    rows = selection.index_rows(
        statuses, drawn.clusters[:, -1], drawn.balanced, config.holdout, drawn.retrieved
    )
    index = ImageIndex(rows, _measured(context.name, _pixels(config, context), filtered.moments))
    index.save(context.out)
    np.save(context.out / "levels.npy", drawn.clusters.astype(np.int32))
    report = _reported(config, context, index, statuses, scanned, filtered.near, drawn, vectors.shape[1])
    return {name: float(report[name]) for name in _SUMMARY}


def _stop_if_asked(context: Context) -> None:
    if context.stop.is_set():
        raise Stopped


def _max_pixels(config: Curate, context: Context) -> dict[str, int]:
    return {name: context.sources[name].max_pixels for name in config.data}


def _pixels(config: Curate, context: Context) -> dict[str, PixelFormat | None]:
    return {name: context.sources[name].pixels for name in config.data}


def _roots(config: Curate, context: Context) -> dict[str, Path]:
    return {name: context.sources[name].root for name in config.data}


def _without_repeats(config: Curate, context: Context, scanned: Scanned) -> _Filtered:
    """Describe each photo, and leave out repeats and what is nearly one; many near duplicates are a warning."""
    different = {photo.sha256 for photo in scanned.photos if not photo.error}
    described = Meter(context.name, len(different), "photos described")

    def step() -> None:
        _stop_if_asked(context)
        described.add()

    near: list[NearLimit] = []
    moments: list[NDArray[np.float64]] = []
    statuses, descriptors = selection.filter_images(
        scanned.photos,
        _roots(config, context),
        config.near_duplicate,
        config.near_duplicate_relative,
        step,
        _max_pixels(config, context),
        _pixels(config, context),
        near.extend,
        scanned.known,
        moments.extend,
    )
    for limit in near:
        if (warning := limit.warning()) is not None:
            logger.warning("%s: %s", context.name, shortened(warning, _WARNING))
    return _Filtered(statuses, descriptors, near, moments)


def _vectors(config: Curate, context: Context, filtered: _Filtered) -> tuple[Vectors, list[ImageStatus]]:
    """What the unique photos are clustered by, and the statuses after it; a network's features are saved, too."""
    if not isinstance(config.embedding, str):
        from orchestrator.stages.curate.embed import embed_unique

        return embed_unique(config, config.embedding, context, filtered.statuses)
    return ArrayVectors(filtered.descriptors), filtered.statuses


def _drawn(
    config: Curate, context: Context, vectors: Vectors, statuses: Sequence[ImageStatus], target: int
) -> _Drawn:
    """Cluster the unique photos, draw `target` of them evenly, and find what is near to seed sets."""
    count = vectors.shape[0]
    stop = partial(_stop_if_asked, context)
    levels = cluster_levels(
        vectors,
        config.clusters,
        context.seed,
        resampling=config.resampling,
        workers=block_workers(config.workers, context.name, count),
        work=context.work / "clusters",
        stop=stop,
    )
    balanced = draw(levels, target, context.seed)
    retrieved, retrieval = find_near(
        context.name,
        config.retrieve,
        statuses,
        vectors,
        config.holdout,
        block_workers(config.workers, context.name, count),
        stop,
    )
    return _Drawn(levels, levels.of_vectors(), balanced, retrieved, retrieval)


def _target(config: Curate, num_unique: int, stage: str) -> int:
    """Photos of the balanced component."""
    if config.clusters[0] > num_unique:
        raise UserError(
            f"{config.clusters[0]} clusters cannot be made of {num_unique} different photos",
            where=f"stages.{stage}.clusters",
            hint=f"use at most {num_unique}",
        )
    if isinstance(config.sample, float):
        return max(1, round(config.sample * num_unique))
    if config.sample > num_unique:
        raise UserError(
            f"a sample of {config.sample} cannot be taken from {num_unique} different photos",
            where=f"stages.{stage}.sample",
            hint=f"use at most {num_unique}, or a share such as 0.5",
        )
    return config.sample


def _measured(
    stage: str, pixels: Mapping[str, PixelFormat | None], moments: Sequence[NDArray[np.float64]]
) -> dict[str, PixelFormat | None]:
    """How files are seen, with the mean and deviation of these pictures where the pipeline file gives none."""
    if not moments:
        return dict(pixels)
    mean, std = mean_and_std(moments)
    logger.info("%s: the bands have the mean %s and the deviation %s", stage, list(mean), list(std))
    return {
        name: found.model_copy(update={"mean": found.mean or mean, "std": found.std or std})
        if found is not None and found.is_measured
        else found
        for name, found in pixels.items()
    }


def _reported(
    config: Curate,
    context: Context,
    index: ImageIndex,
    statuses: Sequence[ImageStatus],
    scanned: Scanned,
    near: Sequence[NearLimit],
    drawn: _Drawn,
    dim: int,
) -> dict[str, Any]:
    """Write what became of every file, as tables and as a picture, and tell it."""
    roots = _roots(config, context)
    others = [selection.left_out(name, item, roots[name]) for name, item in scanned.left_out]
    write_provenance(context.out / "provenance.parquet", [*statuses, *others], index)
    accounts = accounts_of(config.data, [*statuses, *others])
    levels = [
        {"clusters": int(column.max()) + 1, "inertia": inertia}
        for column, inertia in zip(drawn.clusters.T, drawn.levels.inertias, strict=True)
    ]
    report = report_of(config, statuses, others, index, dim, levels)
    report["near_duplicate_limits"] = {one.source: one.record() for one in near}
    if drawn.retrieval:
        report["retrieved"] = drawn.retrieval
    report["account"] = {one.source: one.record() for one in accounts}
    (context.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    draw_clusters(index, drawn.levels.distances_N, context.out / "clusters.png")
    context.run.file(context.out / "clusters.png", "curation")
    show_account(context, accounts)
    log_first(context.name, report)
    return report
