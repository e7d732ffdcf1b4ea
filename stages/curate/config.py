"""Curation: whole, distinct photographs, clustered by look and sampled evenly.

After DINOv3 (arXiv 2508.10104, section 3.1) and Vo et al. (arXiv 2405.15613): hierarchical k-means with resampling, and
a sample that is balanced at every level. Without a network, a classical thumbnail descriptor stands for its embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from orchestrator.config.schema import Cluster, Names
from orchestrator.config.settings import in_key_if_set, operational
from orchestrator.data.curation.components import CHOSEN, LEFT_OUT, RETRIEVED
from orchestrator.data.views import Side
from orchestrator.errors import UserError
from orchestrator.stages.base import Context, PlanContext, Stage
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.curate.retrieval import Retrievals, check_seeds
from orchestrator.stages.curate.workers import Workers

_MAX_LEVELS = 16
# What the networks that are likely to be given were trained at.
_SIZE = 224


def _levels(value: Any) -> Any:
    """Levels as they are given, or one level."""
    return value if isinstance(value, (list, tuple)) else (value,)


_Count = Annotated[int, Field(ge=1)]
Levels = Annotated[
    tuple[_Count, ...], BeforeValidator(_levels, json_schema_input_type=_Count | tuple[_Count, ...])
]


class EmbeddingNetwork(NetworkSource):
    """The network whose image features are clustered. It is specified like a teacher without heads."""

    size: Side | None = Field(
        None, description="The side of the images that the network sees, in pixels. Default: 224."
    )

    @property
    def side(self) -> int:
        """The side of the images that the network sees, in pixels."""
        return self.size or _SIZE


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
        "their 32×32 thumbnails. 0 keeps all near-duplicates.",
    )

    near_duplicate_relative: float | None = Field(
        0.15,
        gt=0,
        le=10,
        description="The maximum difference of two near-duplicates, as a share of the usual difference between an "
        "image of the dataset and the image that is most similar to it. The smaller limit of this and `near_duplicate` "
        "applies, so that the images of a camera that stands still are kept. null applies `near_duplicate` alone.",
    )

    retrieve: Retrievals = in_key_if_set(
        (),
        description="The seed sets, one or a list, whose nearest images are the component `retrieved` (DINOv3, section "
        "3.1). An image may be in both components, `balanced` and `retrieved`. Training uses both unless `mix` says "
        "otherwise.",
    )

    holdout: float = in_key_if_set(
        0.0,
        ge=0,
        lt=1,
        description="The share of unique images that are held out from training, from 0 to below 1: the component "
        "`held_out`, on which `validate_every` of a training stage computes its losses. Whether an image is held out "
        "depends only on its bytes.",
    )

    workers: Workers = operational(
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
        limits = f"at most {self.near_duplicate:g} grey levels"
        if self.near_duplicate_relative is not None:
            limits += f" and {self.near_duplicate_relative:g} times the usual difference in their dataset"
        return [f"of pictures that differ by {limits}, one is kept (near_duplicate, near_duplicate_relative)"]

    def run(self, context: Context) -> Mapping[str, float]:
        """Scans, removes repeats, embeds, clusters and samples; deterministic in the files, config and seed.

        Raises:
            UserError: an unknown or empty source, nothing readable, or more clusters or samples than photos.
            Stopped: the user asked for it; the stage starts over next time.
        """
        from orchestrator.stages.curate.curation import run_curation

        return run_curation(self, context)
