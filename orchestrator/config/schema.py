"""A pipeline file: its data, its cluster, its stages."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from orchestrator.config.elastic import Elastic
from orchestrator.config.extension import Address
from orchestrator.config.pixels import PixelFormat
from orchestrator.config.settings import Settings, operational

# Of draws, or of steps: shares are exact over cycles of up to a million.
MIN_SHARE = 1e-6


def _usable_path(path: Path) -> Path:
    text = str(path)
    if "\0" in text:
        raise ValueError("must be a path without NUL characters")
    if len(os.fsencode(text)) > 4096 or any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise ValueError("must be a path of at most 4096 bytes, with names of at most 255")
    return path


# A path on this machine that a file system could have.
LocalPath = Annotated[Path, AfterValidator(_usable_path)]
# 108-megapixel telephones and 102-megapixel cameras are below it.
MAX_PIXELS = 120_000_000


class DataSource(Settings):
    """A dataset: a folder of images with an optional table of captions and labels, or a manifest of images."""

    path: LocalPath = Field(
        description="The folder of images, or `s3://bucket/prefix`. Subfolders are searched, too, unless a `manifest` "
        "names the images."
    )
    manifest: LocalPath | None = Field(
        None,
        description="A table that names the images of the dataset: CSV, JSON lines or Parquet, with a `path` column "
        "and, optionally, `caption` and `label`. Nothing else in the folder is read. Default: all images in the "
        "folder.",
    )
    shards: Literal["tar", "parquet"] | None = Field(
        None,
        description="With `tar`, the images are in the uncompressed tar files in the folder, as WebDataset writes "
        "them: files of one name are a sample, such as 0001.jpg with 0001.txt (caption), 0001.cls (label) or 0001.json "
        "(both). With `parquet`, they are in a column of image bytes. Default: the images are files themselves.",
    )
    labels: Literal["folders"] | None = Field(
        None,
        description="The source of labels besides tables. With `folders`, an image that no table labels gets the name "
        "of the first folder below `path` that it is in. Default: only tables give labels.",
    )
    captions: LocalPath | None = Field(
        None,
        description="A CSV file with a `file` column and, optionally, `caption` and `label` columns. Default: images "
        "have no captions or labels.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=2**31 - 1,
        description="The maximum width × height of an image, in pixels. Larger images are left out. The size is read "
        "from the file's header, before the image is decoded.",
    )
    pixels: PixelFormat | None = Field(
        None,
        description="The bands, the range of values, the mean and the standard deviation of the files' pixels. They "
        "travel with the models that are trained on the files. Default: 8-bit grey, RGB, or RGB with transparency on "
        "white, and ImageNet's mean and standard deviation.",
    )
    max_left_out: float = operational(
        0.1,
        ge=0,
        le=1,
        description="The maximum share of the dataset's pictures that may be left out because their format, their "
        "size or damage makes them unreadable, from 0 to 1. Above this share nothing runs, and the error names the "
        "pictures. Hidden files, duplicates, texts and tables do not count.",
    )
    licence: str | None = operational(
        None,
        max_length=500,
        description="The licence of the images, as a free text such as `CC-BY-4.0`. The cards of published models "
        "name it. Default: the cards say that it is not stated.",
    )

    @property
    def is_remote(self) -> bool:
        """Whether the images are in a bucket; its address is `s3:/bucket/prefix` as a path."""
        return str(self.path).startswith("s3:/")

    @property
    def root(self) -> Path:
        """Where images are: the absolute folder, or the address of the bucket as a path."""
        return self.path if self.is_remote else self.path.resolve()

    @property
    def is_there(self) -> bool:
        """Whether the folder exists; of a bucket that is known once it is asked."""
        return self.is_remote or self.path.is_dir()

    @model_validator(mode="after")
    def _one_table(self) -> DataSource:
        if self.manifest is not None and self.captions is not None:
            raise ValueError("a manifest has captions and labels itself: leave out `captions` or `manifest`")
        if self.shards is not None and (self.manifest or self.captions or self.labels):
            raise ValueError(
                "captions and labels of `shards` are in them: leave out the other table, and `labels`"
            )
        return self


class TrackingSettings(Settings):
    """Where MLflow keeps runs and the registry."""

    uri: str = Field("sqlite:///runs/mlflow.db", description="The address of the MLflow server or database.")
    experiment: str | None = Field(
        None, description="The MLflow experiment of the runs. Default: the pipeline's name."
    )


PreemptionNotices = Literal["auto", "aws", "gce", "azure", "kubernetes", "off"]


class Cluster(Settings):
    """The Ray cluster that the pipeline runs on."""

    address: str = Field(
        "local",
        description="The Ray cluster to use: `local` starts one on this machine for the run, `auto` joins the cluster "
        "that this machine is a node of, `host:port` joins the cluster with its head at that address.",
    )
    preemption_notices: PreemptionNotices = operational(
        "auto",
        description="The source of preemption notices, after which a machine's Ray node is drained. `auto` detects "
        "the cloud from each machine's firmware and polls its metadata service; on other machines nothing is polled. "
        "With `kubernetes` nothing is polled either: the pods' preStop hooks drain the nodes.",
    )
    dashboard: bool = operational(
        False,
        description="Whether a `local` cluster runs Ray's dashboard, which shows Ray Train runs and exports Prometheus "
        "metrics. It requires the package extra `dashboard`, which installs ray[default].",
    )

    @field_validator("address")
    @classmethod
    def _no_client(cls, address: str) -> str:
        if "://" in address:
            raise ValueError(
                f"{address!r} is not an address that a driver can run at: it needs a node of the cluster. "
                "Hand the pipeline to the cluster with `ray job submit -- orchestrator run …` and the address "
                "auto (docs/clusters.md)"
            )
        if not re.fullmatch(r"local|auto|[\w.\-]+:\d{1,5}", address):
            raise ValueError(f"must be local, auto or host:port, not {address!r}")
        return address


class Hardware(Settings):
    """The machines for which `orchestrator plan` estimates costs. It does not change how stages run."""

    devices: int = Field(ge=1, description="The number of accelerators that train at the same time.")
    name: str = Field("H100 SXM", description="The name of the accelerator, used only for display.")
    peak_tflops: float = Field(
        989.0,
        gt=0,
        description="The dense bf16 peak of one accelerator, in TFLOP/s (10¹² operations per second). 989 is that of "
        "the H100 SXM in NVIDIA's data sheet.",
    )
    memory_gib: float = Field(80.0, gt=0, description="The memory of one accelerator, in GiB.")
    mfu: float = Field(
        0.4,
        gt=0,
        le=1,
        description="The model FLOPs utilization: the share of the peak that training reaches while it computes, "
        "above 0 and at most 1.",
    )
    mfu_source: Literal["assumed", "measured", "fitted"] = Field(
        "assumed",
        description="The origin of `mfu`. fitted means that it was chosen to reproduce published hours, and `plan` "
        "then says that its hours are not a prediction.",
    )
    collective_gb_s: float | None = Field(
        None,
        gt=0,
        description="The bandwidth of collective operations per accelerator, in GB/s (10⁹ bytes per second), while "
        "all accelerators communicate. Default: communication time is not counted.",
    )
    input_images_s: float | None = Field(
        None,
        gt=0,
        description="The number of images per second that the CPUs of one accelerator decode and crop. Default: the "
        "time for input data is not counted.",
    )


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[
    tuple[str, ...], BeforeValidator(_one_or_many, json_schema_input_type=str | tuple[str, ...])
]


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _mix(value: Any) -> Any:
    """One name, a list of names, or weights by name; a list without repeats, in one order."""
    names = (value,) if isinstance(value, str) else value
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(sorted(set(names)))
    if not isinstance(names, Mapping) or not names:
        raise ValueError("mix must be a name, a list of names, or a mapping of names to weights")
    names = {name: _number(weight) for name, weight in names.items()}
    for name, weight in names.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not isinstance(name, str) or not number or not 0 < weight < math.inf:
            raise ValueError(f"the weight of {name!r} must be a number above 0, not {weight!r}")
    total = sum(names.values())
    for name, weight in names.items():
        # A sum that is infinite has weights that are out of bounds, which is said elsewhere.
        if weight / total < MIN_SHARE and total < math.inf:
            raise ValueError(
                f"the weight of {name!r} is {weight / total:.3g} of all weights: give it {MIN_SHARE * total:.3g} or "
                "more, one draw in a million, or leave it out"
            )
    return names


# Names of components and datasets, or their weights.
Mix = Annotated[
    tuple[str, ...] | dict[str, float],
    BeforeValidator(_mix, json_schema_input_type=str | tuple[str, ...] | dict[str, float]),
]


class StageSpec(Settings):
    """What every stage has. Subclasses narrow `kind` to a Literal and add their own fields.

    Attributes:
        renamed: keys as they were called before, and what they are called now. A file with old keys is read.
    """

    renamed: ClassVar[Mapping[str, str]] = {}

    kind: str = Field(
        description="The kind of the stage, such as `pretrain`. It decides which keys the stage has."
    )
    needs: Names = Field(
        (), description="The stages whose artifacts this stage reads, as one name or a list."
    )


S = TypeVar("S", bound=StageSpec)


class Pipeline(Settings, Generic[S]):
    """A whole pipeline file, parametrised by the union of stage configs."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9\-]*$",
        max_length=100,
        description="The name of the pipeline in the ledger, in MLflow and in the names of published models: at most "
        "100 lowercase letters, digits and hyphens.",
    )
    seed: int = Field(0, description="The seed of all random numbers in all stages.")
    store: Annotated[str, Address()] = operational(
        "runs/",
        description="The store of artifacts, checkpoints and the ledger: a folder, or `s3://bucket/prefix`.",
    )
    tracking: TrackingSettings = operational(
        TrackingSettings(),
        description="The MLflow server or database that keeps runs and the model registry.",
    )
    cluster: Cluster = operational(Cluster(), description="The Ray cluster that the pipeline runs on.")
    elastic: Elastic = operational(
        Elastic(),
        description="How training stages use machines that come and go. A stage can override it key by key.",
    )
    hardware: Hardware | None = operational(
        None,
        description="The machines for which `orchestrator plan` estimates costs. Default: no costs are printed.",
    )
    data: dict[str, DataSource] = Field({}, description="The datasets that stages can read, by name.")
    stages: dict[str, S] = Field(description="The stages by name. Their order in the file does not matter.")
