"""Curation: whole, distinct photographs, clustered by look and sampled evenly.

After DINOv3 (arXiv 2508.10104, section 3.1) and Vo et al. (arXiv 2405.15613): hierarchical k-means with resampling, and
a sample that is balanced at every level. Without a network, a classical thumbnail descriptor stands for its embedding.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from orchestrator.config.schema import Cluster, Names
from orchestrator.config.settings import in_key_if_set, operational
from orchestrator.data.curation.components import CHOSEN, LEFT_OUT, RETRIEVED
from orchestrator.data.views import Side
from orchestrator.errors import Stopped, UserError, nearest, shortened
from orchestrator.fsio import sha256_of
from orchestrator.progress import Meter
from orchestrator.stages.base import Context, PlanContext, Stage
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.curate.report import (
    accounts_of,
    report_of,
    show_account,
    tell_first,
    write_provenance,
)
from orchestrator.stages.curate.retrieval import Retrievals, check_seeds, find_near

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.config.pixels import PixelFormat
    from orchestrator.data.curation.block_workers import BlockWorkers
    from orchestrator.data.curation.dedup import NearLimit
    from orchestrator.data.curation.selection import ImageStatus
    from orchestrator.data.curation.signatures import SignatureCache
    from orchestrator.data.curation.vectors import Vectors
    from orchestrator.data.sources.folder import LeftOut
    from orchestrator.data.sources.scan import ScannedImage

logger = logging.getLogger("orchestrator")

_MAX_LEVELS = 16
# What the networks that are likely to be given were trained at.
_SIZE = 224
# Photos from which on a cluster of one machine is used, since it may grow.
_MANY = 200_000
# Characters of a warning about near duplicates.
_WARNING = 900


def _levels(value: Any) -> Any:
    """Levels as they are given, or one level."""
    return value if isinstance(value, (list, tuple)) else (value,)


_Count = Annotated[int, Field(ge=1)]
Levels = Annotated[
    tuple[_Count, ...], BeforeValidator(_levels, json_schema_input_type=_Count | tuple[_Count, ...])
]


class EmbeddingNetwork(NetworkSource):
    """The network whose image features photos are clustered by. It is given as a headless teacher is."""

    size: Side | None = Field(
        None, description="The side of the images that the network sees, in pixels. Default: 224."
    )


class Curate(Stage):
    """Files of one or more datasets → the index of photographs that training reads.

    Photographs are not copied. The index has their absolute folder, their path in it and their sha256, so it is valid
    on all machines that have the folder at the same path.

    `embedding: thumbnail` describes colours and edges, not content, so clusters contain images that look similar.
    With a network, they contain images that it sees as similar.
    """

    # The network may be given as `from`.
    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["curate"]
    data: Names = Field(
        min_length=1,
        description="The names of the datasets to curate. If two of them contain the same image, the first one's copy "
        "is kept.",
    )
    clusters: Levels = Field(
        (16,),
        min_length=1,
        max_length=_MAX_LEVELS,
        description="The number of k-means clusters that sampling balances: one number, or one for each level, finest "
        "first, such as [8000, 800, 100]. The clusters of a level are clusters of the centres of the level before.",
    )
    resampling: int = Field(
        3,
        ge=0,
        le=100,
        description="How many times each level is clustered again from the images that are nearest to its centres. "
        "This moves clusters from frequent kinds of images to rare ones.",
    )
    sample: int | float = Field(
        0.5,
        description="The number of images to select, balanced over the clusters: a count, or a share of the unique "
        "images above 0 and up to 1.0.",
    )
    embedding: Literal["thumbnail"] | EmbeddingNetwork = Field(
        "thumbnail",
        description="The features that images are clustered by: those of a network, given as `from`, `timm`, "
        "`transformers` or `module`; or thumbnail, which describes colours and edges and needs no weights.",
    )
    near_duplicate: float = Field(
        3.0,
        ge=0,
        le=255,
        description="The maximum root mean square difference of two near-duplicates, in grey levels (0 to 255) of "
        "their 32×32 thumbnails.",
    )

    near_duplicate_relative: float | None = Field(
        0.15,
        gt=0,
        le=10,
        description="The maximum difference of two near-duplicates as a share of how far pictures of the dataset "
        "usually are from the most similar other one; the smaller one of this and `near_duplicate` counts. So the "
        "pictures of a camera that stands still are kept. null: only `near_duplicate` counts.",
    )

    retrieve: Retrievals = in_key_if_set(
        (),
        description="The seed sets, one or a list, whose nearest images are the component `retrieved` (DINOv3, section "
        "3.1). An image may be balanced and retrieved. Training uses both unless `mix` says otherwise.",
    )

    holdout: float = in_key_if_set(
        0.0,
        ge=0,
        lt=1,
        description="The share of unique images that are held out from training, from 0 to 1: the component "
        "`held_out`, on which `validate_every` of a training stage computes its losses. Whether an image is held out "
        "depends only on its bytes.",
    )

    workers: Literal["auto", "threads", "ray"] = operational(
        "auto",
        description="What embeds and clusters images: threads of the process that runs the pipeline, or the Ray "
        "cluster. auto uses a cluster that the pipeline joined, if it has more than one machine or there are 200,000 "
        "images or more, and threads otherwise. Ray needs the images under the same paths on all machines.",
    )

    version: ClassVar[int] = 2
    needs_ray: ClassVar[bool] = False
    components: ClassVar[tuple[str, ...]] = (CHOSEN, LEFT_OUT)
    outputs: ClassVar[Mapping[str, str]] = {
        "index.parquet": "one row a unique photo: where it is, caption, label, cluster, component",
        "embeddings.npy": "float32, one row per row of the index",
        "levels.npy": "int32, one row per row of the index: its cluster at each level, finest first",
        "provenance.parquet": "every file of the sources: what happened to it and why",
        "report.json": "counts, duplicate groups, corrupt files, clusters",
        "account.json": "files of each dataset that were taken, and left out by reason, as a table",
        "clusters.png": "a few photos of each cluster",
    }

    @field_validator("sample")
    @classmethod
    def _sensible(cls, value: float) -> float:
        if value <= 0 or (isinstance(value, float) and value > 1):
            raise ValueError("give a whole number of photos, or a share above 0 and at most 1.0")
        return value

    @field_validator("clusters")
    @classmethod
    def _fewer_each_level(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        for fine, coarse in pairwise(value):
            if coarse >= fine:
                raise ValueError(
                    f"{list(value)} has {coarse} clusters of {fine}: give the finest level first, fewer at each next"
                )
        return value

    @model_validator(mode="after")
    def _seeds(self) -> Curate:
        check_seeds(self.retrieve, self.data)
        return self

    def made_components(self) -> tuple[str, ...]:
        """See :class:`Stage`."""
        return (*self.components, RETRIEVED) if self.retrieve else self.components

    def uses_ray(self, cluster: Cluster) -> bool:
        """See :class:`Stage`."""
        return self.workers == "ray" or (self.workers == "auto" and cluster.address != "local")

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Stage`."""
        if isinstance(self.embedding, str):
            return {}
        return {f"embedding.{field}": paths for field, paths in self.embedding.files().items()}

    def check(self) -> None:
        """See :class:`Stage`: the network."""
        if isinstance(self.embedding, str):
            return
        try:
            self.embedding.check(_SIZE)
        except UserError as error:
            raise UserError(error.what, where=f"embedding.{error.where}", hint=error.hint) from None

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: more clusters, or a larger sample, than there are photos."""
        if plan_context.photos is None:
            return []
        most = plan_context.photos.photos
        found = []
        if self.clusters[0] > most:
            what = f"{self.clusters[0]} clusters cannot be made of {most} photos"
            found.append(UserError(what, where="clusters", hint=f"use at most {most}"))
        if isinstance(self.sample, int) and self.sample > most:
            what = f"a sample of {self.sample} cannot be taken from {most} photos"
            hint = f"use at most {most}, or a share such as 0.5"
            found.append(UserError(what, where="sample", hint=hint))
        return found

    def choices(self) -> list[str]:
        """See :class:`Stage`: what counts as a near duplicate."""
        if not self.near_duplicate:
            return ["pictures that look nearly the same are all kept (near_duplicate: 0)"]
        near = f"pictures that differ by at most {self.near_duplicate:g} grey levels"
        if self.near_duplicate_relative is not None:
            near += f" and {self.near_duplicate_relative:g} of what is usual in their dataset"
        return [f"of {near}, one is kept (near_duplicate, near_duplicate_relative)"]

    def run(self, context: Context) -> Mapping[str, float]:
        """Scans, removes repeats, embeds, clusters and samples; deterministic in the files, config and seed.

        Raises:
            UserError: an unknown or empty source, nothing readable, or more clusters or samples than photos.
            Stopped: the user asked for it; the stage starts over next time.
        """
        import numpy as np

        from orchestrator.data.curation import selection
        from orchestrator.data.curation.contact_sheet import draw_clusters
        from orchestrator.data.curation.hierarchy import cluster_levels, draw
        from orchestrator.data.curation.vectors import ArrayVectors
        from orchestrator.data.index import ImageIndex

        def stop() -> None:
            if context.stop.is_set():
                raise Stopped

        photos, left_out, known = self._scan(context)
        stop()
        different = {photo.sha256 for photo in photos if not photo.error}
        described = Meter(context.name, len(different), "photos described")
        roots = {name: context.sources[name].root for name in self.data}
        limits = {name: context.sources[name].max_pixels for name in self.data}

        def step() -> None:
            stop()
            described.add()

        pixels = {name: context.sources[name].pixels for name in self.data}
        near: list[NearLimit] = []
        levels_of: list[NDArray[np.float64]] = []
        statuses, descriptors = selection.filter_images(
            photos,
            roots,
            self.near_duplicate,
            self.near_duplicate_relative,
            step,
            limits,
            pixels,
            near.extend,
            known,
            levels_of.extend,
        )
        for told in near:
            if (warning := told.said()) is not None:
                logger.warning("%s: %s", context.name, shortened(warning, _WARNING))
        vectors: Vectors = ArrayVectors(descriptors)
        if not isinstance(self.embedding, str):
            vectors, statuses = self._embedded(context, self.embedding, statuses, limits, pixels)
        target = self._target(vectors.shape[0], context.name)
        if isinstance(self.embedding, str):
            np.save(context.out / "embeddings.npy", descriptors)
        levels = cluster_levels(
            vectors,
            self.clusters,
            context.seed,
            resampling=self.resampling,
            workers=self._workers(context.name, vectors.shape[0]),
            work=context.work / "clusters",
            stop=stop,
        )
        balanced = draw(levels, target, context.seed)
        clusters = levels.of_vectors()
        retrieved, retrieval = find_near(
            context.name,
            self.retrieve,
            statuses,
            vectors,
            self.holdout,
            self._workers(context.name, vectors.shape[0]),
            stop,
        )
        rows = selection.index_rows(statuses, clusters[:, -1], balanced, self.holdout, retrieved)
        index = ImageIndex(rows, _measured(context.name, pixels, levels_of))
        index.save(context.out)
        np.save(context.out / "levels.npy", clusters.astype(np.int32))
        others = [selection.left_out(name, item, roots[name]) for name, item in left_out]
        write_provenance(context.out / "provenance.parquet", [*statuses, *others], index)
        accounts = accounts_of(self.data, [*statuses, *others])
        found = [
            {"clusters": int(column.max()) + 1, "inertia": inertia}
            for column, inertia in zip(clusters.T, levels.inertias, strict=True)
        ]
        report = report_of(self, statuses, others, index, vectors.shape[1], found)
        report["near_duplicate_limits"] = {one.source: one.record() for one in near}
        if retrieval:
            report["retrieved"] = retrieval
        report["account"] = {one.source: one.record() for one in accounts}
        (context.out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        draw_clusters(index, levels.distances_N, context.out / "clusters.png")
        context.run.file(context.out / "clusters.png", "curation")
        show_account(context, accounts)
        tell_first(context.name, report)
        summary = ("images", "unique", "corrupt", "duplicates", "left_out", "clusters")
        return {name: float(report[name]) for name in summary}

    def _embedded(
        self,
        context: Context,
        network: EmbeddingNetwork,
        statuses: Sequence[ImageStatus],
        limits: Mapping[str, int],
        pixels: Mapping[str, PixelFormat | None],
    ) -> tuple[Vectors, list[ImageStatus]]:
        """What the network says of the unique photos, and the statuses without those that went meanwhile."""
        from orchestrator.data.curation.vectors import open_vectors
        from orchestrator.stages.curate.embed import PhotoFile, embed_photos

        rows = [row for row, status in enumerate(statuses) if status.status == "unique"]
        photos = [
            PhotoFile(
                Path(status.root) / status.photo.path,
                status.photo.sha256,
                limits[status.photo.source],
                pixels[status.photo.source],
            )
            for status in (statuses[row] for row in rows)
        ]
        embedded = Meter(context.name, len(photos), "photos embedded")

        def step(count: int) -> None:
            embedded.add(count)
            if context.stop.is_set():
                raise Stopped

        file = context.out / "embeddings.npy"
        lost = embed_photos(
            photos,
            network,
            network.size or _SIZE,
            context.work / "embedded",
            file,
            where=f"stages.{context.name}.embedding",
            identity=json.dumps(
                [self.version, *([sha256_of(path) for path in paths] for paths in network.files().values())]
            ),
            device=context.elastic.device,
            step=step,
            actors=self._ray_processors(context.name, len(photos)),
        )
        left = list(statuses)
        for number in lost:
            left[rows[number]] = replace(
                left[rows[number]], status="corrupt", reason="it cannot be read any more"
            )
        return open_vectors(file), left

    def _workers(self, stage: str, count: int) -> BlockWorkers | None:
        """What clusters so many photos; None for threads."""
        processors = self._ray_processors(stage, count)
        if processors is None:
            return None
        from orchestrator.data.curation.block_workers import RayWorkers

        return RayWorkers(processors)

    def _ray_processors(self, stage: str, count: int) -> int | None:
        """How many processors of the Ray cluster work on so many photos; None for threads of this process."""
        ray = sys.modules.get("ray")
        if self.workers == "threads" or ray is None or not ray.is_initialized():
            return None
        from orchestrator.elastic.resources import cluster_nodes

        nodes = cluster_nodes()
        if self.workers == "auto" and len(nodes) < 2 and count < _MANY:
            return None
        # Ray may believe in more processors than a machine has.
        cores = sum(min(node.resources.get("CPU", 0.0), node.cores) for node in nodes)
        free = int(min(cores, ray.available_resources().get("CPU", 0.0)))
        if free < 1:
            logger.warning("%s: no processor of the Ray cluster is free: threads of this process work", stage)
            return None
        return free

    def _scan(
        self, context: Context
    ) -> tuple[list[ScannedImage], list[tuple[str, LeftOut]], dict[str, SignatureCache]]:
        """The photos of all sources, what else is there, and what the photos of each source look like."""
        from orchestrator.data.curation.signatures import SignatureCache
        from orchestrator.data.sources.folder import list_images
        from orchestrator.data.sources.pixel_checks import unclear_range
        from orchestrator.data.sources.scan import scan

        listings = {}
        for name in self.data:
            if name not in context.sources:
                near = nearest(name, context.sources)
                raise UserError(
                    f"there is no dataset {name!r}",
                    where=f"stages.{context.name}.data",
                    hint=f"did you mean {near!r}?" if near else f"name one of {sorted(context.sources)}",
                )
            listings[name] = list_images(context.sources[name], name)
        read = Meter(context.name, sum(len(listing.files) for listing in listings.values()), "photos read")
        photos: list[ScannedImage] = []
        left_out: list[tuple[str, LeftOut]] = []
        known: dict[str, SignatureCache] = {}
        for name, listing in listings.items():
            source = context.sources[name]
            known[name] = SignatureCache(source.max_pixels, source.pixels)
            photos += scan(source, name, listing, read.add, known[name])
            left_out += [(name, item) for item in listing.left_out]
        _ask_if_many(context, self.data, photos, left_out)
        for name in self.data:
            if error := unclear_range(name, [photo.peak for photo in photos if photo.source == name]):
                raise error
        if all(photo.error for photo in photos):
            raise UserError(
                f"none of the {len(photos)} images can be read; {photos[0].path}: {photos[0].error}",
                where=str(context.sources[photos[0].source].path),
                hint="check that the files were copied whole",
            )
        return photos, left_out, known

    def _target(self, num_unique: int, stage: str) -> int:
        """Photos of the balanced component."""
        if self.clusters[0] > num_unique:
            raise UserError(
                f"{self.clusters[0]} clusters cannot be made of {num_unique} different photos",
                where=f"stages.{stage}.clusters",
                hint=f"use at most {num_unique}",
            )
        if isinstance(self.sample, float):
            return max(1, round(self.sample * num_unique))
        if self.sample > num_unique:
            raise UserError(
                f"a sample of {self.sample} cannot be taken from {num_unique} different photos",
                where=f"stages.{stage}.sample",
                hint=f"use at most {num_unique}, or a share such as 0.5",
            )
        return self.sample


def _ask_if_many(
    context: Context,
    names: Sequence[str],
    photos: Sequence[ScannedImage],
    left_out: Sequence[tuple[str, LeftOut]],
) -> None:
    """Stop with the question if more of a dataset would be left out than it allows.

    Raises:
        UserError: that.
    """
    from orchestrator.data.sources import account as accounts

    for name in names:
        photos_of = [photo for photo in photos if photo.source == name]
        files = [
            (photo.path, photo.error_kind or accounts.TAKEN, photo.error or "", 1) for photo in photos_of
        ]
        files += [
            (item.path, item.kind, item.reason, item.pictures) for source, item in left_out if source == name
        ]
        # That none can be read has a message of its own.
        one, limit = accounts.account(name, files), context.sources[name].max_left_out
        if one.taken and (error := accounts.lost_too_many(one, limit, f"data.{name}.max_left_out")):
            raise error


def _measured(
    stage: str, pixels: Mapping[str, PixelFormat | None], moments: Sequence[NDArray[np.float64]]
) -> dict[str, PixelFormat | None]:
    """How files are seen, with the mean and deviation of these pictures where the pipeline file gives none."""
    from orchestrator.data.bands import mean_and_std

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
