"""Distilling from teachers without heads: which they are, what of them is learnt, and what can be checked of both.

A headless teacher is any backbone. It gives what it sees (a feature of the image and one of each patch), and students
learn to say the same through a projection (AM-RADIO, arXiv 2312.06709).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, StringConstraints, model_validator

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.settings import Settings, Strict, in_key_if_set
from orchestrator.data.views import CropConfig, Side
from orchestrator.errors import UserError
from orchestrator.stages.common.network_source import NetworkSource, as_recorded

OWN = "self"
"""The name of the stage's own teacher artifact, where no other teacher is named."""

TeacherName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class TeacherShape(Strict):
    """What a headless teacher gives: features of `dim` on `grid` (rows, columns), known after one probing forward."""

    dim: int
    grid: tuple[int, int]


class TermWeights(NamedTuple):
    """The weights of one teacher's losses: on its image features, on its patch features, and on local crops."""

    cls: float
    patches: float
    local: float

    @property
    def uses_cls(self) -> bool:
        """Whether any loss asks for the teacher's image features."""
        return self.cls + self.local > 0

    def rows(self, cells: int) -> int:
        """How many features of a view are asked for, where its patches are `cells`."""
        return self.uses_cls + (cells if self.patches else 0)


class TeacherSource(NetworkSource):
    """A teacher without heads. Exactly one of `from`, `timm`, `transformers` and `module` is given.

    `from` is a `model/` folder of this project, or a file of weights in any known layout, as safetensors or as saved by
    torch.save. `timm` and `transformers` are names of models in these packages, which must be installed. `module` is a
    callable that returns an nn.Module, or the name of an installed package's, into which `weights` are loaded.
    """

    weight: float = Field(
        1.0, gt=0, description="The weight of this teacher's loss relative to other teachers."
    )
    cls_weight: float | None = in_key_if_set(
        None,
        ge=0,
        description="The weight of the loss on this teacher's image features (CLS). Default: `cls_weight` of "
        "`features`.",
    )
    patch_weight: float | None = in_key_if_set(
        None,
        ge=0,
        description="The weight of the loss on this teacher's patch features. Default: `patch_weight` of `features`.",
    )
    size: Side | None = Field(
        None,
        description="The side that global crops are resized to for this teacher, in pixels. Default: they are not "
        "resized.",
    )


class FeatureObjective(Settings):
    """Distillation of teachers without heads: cosine and smooth-L1 losses on image and patch features.

    A student has two projections for each teacher, one of CLS and one of the patches, but none for what has no weight.
    Feature maps with different grids are compared on the coarser grid.
    """

    teachers: dict[TeacherName, TeacherSource] = Field(
        default_factory=dict,
        description="The teachers by name. Default: the backbone of the stage's own teacher artifact.",
    )
    cosine_weight: float = Field(
        0.9,
        ge=0,
        le=1,
        description="The weight of the cosine loss, from 0 to 1. The smooth-L1 loss has the rest (arXiv 2312.06709).",
    )
    cls_weight: float = Field(1.0, ge=0, description="The weight of the loss on image features (CLS).")
    patch_weight: float = Field(1.0, ge=0, description="The weight of the loss on patch features.")
    local_weight: float = Field(
        0.0,
        ge=0,
        description="The weight of the loss between the CLS token of local crops and the mean of the teacher's image "
        "features of the global crops.",
    )
    hidden: int | None = Field(
        None,
        ge=1,
        description="The hidden width of the projections, which then have a hidden layer with a GELU. Default: "
        "projections are linear.",
    )
    whiten: bool = Field(
        False, description="Whether the teachers' features are standardized with PHI-S (arXiv 2410.01680)."
    )
    whiten_images: int = Field(
        512, ge=2, description="The number of training images from which PHI-S is estimated."
    )
    repeat_after: int | None = in_key_if_set(
        None,
        ge=1,
        description="The number of steps after which the same views come again. The teachers' outputs for them are "
        "computed once and kept in the store, which saves most of the time if pictures are few and teachers are large. "
        "Default: every step has new views.",
    )
    dtype: Literal["fp32", "fp16"] = Field(
        "fp32", description="The precision in which teacher features are sent to students."
    )

    @model_validator(mode="after")
    def _learns(self) -> FeatureObjective:
        for name in self.weights:
            if sum(self.terms_of(name)) == 0:
                who = f" from the teacher {name!r}" if self.teachers else ""
                raise ValueError(
                    f"nothing is learnt{who}: cls_weight, patch_weight and local_weight are all 0"
                )
        if not self.whiten and "whiten_images" in self.model_fields_set:
            raise ValueError("whiten_images is for `whiten: true`: leave it out")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Each teacher's weight."""
        return {name: source.weight for name, source in self.teachers.items()} or {OWN: 1.0}

    def terms_of(self, name: str) -> TermWeights:
        """The weights of a teacher's terms, which its own `weight` multiplies."""
        source = self.teachers.get(name)
        own = (source.cls_weight, source.patch_weight) if source else (None, None)
        return TermWeights(
            self.cls_weight if own[0] is None else own[0],
            self.patch_weight if own[1] is None else own[1],
            self.local_weight,
        )

    @property
    def uses_own(self) -> bool:
        """Whether the stage's teacher artifact is the teacher."""
        return not self.teachers

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files of all teachers, by dotted field below this one; see :meth:`Stage.files`."""
        return {
            f"teachers.{name}.{field}": paths
            for name, source in self.teachers.items()
            for field, paths in source.files().items()
        }

    def check_channels(self, pixels: PixelFormat | None) -> None:
        """See that each teacher takes what it would see of the pictures.

        Raises:
            UserError: `where` is the dotted field below this one.
        """
        for name, source in self.teachers.items():
            try:
                as_recorded(source).channels(pixels)
            except UserError as error:
                where = f"teachers.{name}.{error.where}"
                raise UserError(error.what, where=where, hint=error.hint) from None

    def check(self, crops: CropConfig) -> None:
        """Look at all teachers before anything runs; their files are there.

        Args:
            crops: the stage's.

        Raises:
            UserError: `where` is the dotted field below this one.
        """
        if self.local_weight and not crops.num_local:
            hint = "set local_weight: 0, or crops.num_local"
            raise UserError("there are no local crops to weigh", where="local_weight", hint=hint)
        for name, source in self.teachers.items():
            try:
                source.check(crops.global_size)
            except UserError as error:
                where = f"teachers.{name}.{error.where}"
                raise UserError(error.what, where=where, hint=error.hint) from None
