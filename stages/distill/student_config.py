"""What a pipeline file says of one student: its network, its views, and what differs from its stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from orchestrator import installed
from orchestrator.config.elastic import Resources, Workers
from orchestrator.config.schedules import Optimizer, Schedule
from orchestrator.config.settings import Settings, in_key_if_set, only_one, operational
from orchestrator.config.zero_stage import ZeroStage, zero_stage_field
from orchestrator.data.views import MAX_VIEWS, CropConfig, Side
from orchestrator.errors import KeyMistakeError, UserError
from orchestrator.models.configs import RGB, Config, ConvNeXtConfig, ViTConfig
from orchestrator.models.network_spec import LIBRARIES, NetworkSpec
from orchestrator.models.presets import preset
from orchestrator.stages.common.config import (
    OVERRIDES,
    OptionalModelName,
    Overrides,
    Precision,
    with_channels,
)
from orchestrator.stages.common.network_source import (
    A_MODULE,
    MODULE,
    check_installed,
    check_kwargs,
    check_module,
    check_timm,
    kwargs_field,
    module_files,
)
from orchestrator.stages.common.weights import (
    FROM,
    From,
    freeze_field,
    from_field,
)


class Views(Settings):
    """The crop sizes of one student. Its crops show the same image regions and colours as the stage's."""

    global_size: Side = Field(description="The side of this student's global crops, in pixels.")
    local_size: Side | None = Field(
        None, description="The side of this student's local crops, in pixels. Default: the stage's."
    )
    num_local: int | None = Field(
        None,
        ge=0,
        le=MAX_VIEWS,
        description="The number of this student's local crops. Default: the stage's.",
    )


class Student(Settings):
    """One student. Its heads have the same sizes and numbers of prototypes as the teacher's."""

    model_config = ConfigDict(serialize_by_alias=True)

    model: OptionalModelName = Field(
        None,
        description="The name of the student's backbone. `orchestrator models` lists them all. Exactly one of model, "
        "module, timm and transformers is given.",
    )
    model_overrides: Overrides = Field({}, description=OVERRIDES)
    module: Annotated[str | None, A_MODULE] = in_key_if_set(
        None,
        pattern=MODULE,
        description="A callable that returns the student's backbone as an nn.Module, as package.module:callable, or by "
        "the name of an installed package's entry point. It gives what a teacher's module gives.",
    )
    timm: str | None = in_key_if_set(
        None,
        min_length=1,
        description="The name of a timm model that the student is made from, with random weights. timm must be "
        "installed.",
    )
    transformers: str | None = in_key_if_set(
        None,
        min_length=1,
        description="The name or local folder of a transformers model that the student is made from, with random "
        "weights. transformers must be installed.",
    )
    kwargs: dict[str, Any] = kwargs_field()
    from_: From | None = from_field(FROM)
    freeze_backbone_steps: int = freeze_field()
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The drop-path rate: the share of a batch's samples that each residual branch skips, from 0 to "
        "below 1. It applies to `model` only; other networks take it in `kwargs`.",
    )
    optimizer: Optimizer | None = Field(
        None, description="The settings of AdamW for this student. Default: the stage's."
    )
    ema: Schedule | None = Field(
        None, description="The momentum of this student's EMA by step. Default: the stage's."
    )
    mask_inputs: bool = Field(
        True,
        description="Whether the student sees masked global crops, as in the DINOv3 paper; in its published code the "
        "student sees unmasked crops. It applies to `model` only: other networks have no mask token and see unmasked "
        "crops.",
    )
    views: Views | None = Field(
        None, description="The sizes and number of this student's crops. Default: the stage's."
    )
    steps: int | None = Field(
        None, ge=1, description="The number of optimizer steps of this student. Default: the stage's."
    )
    joins: Literal["start", "now"] = Field(
        "start",
        description="The teacher step at which the student starts. start: the first step, whose outputs are computed "
        "again if necessary. now: the step that the other students are at when this one first starts.",
    )
    precision: Precision | None = Field(
        None, description="The training precision of this student. Default: the stage's."
    )
    zero_stage: ZeroStage = zero_stage_field()
    workers: Workers | None = operational(
        None,
        description="The number of workers of this student, as in `elastic.workers`. Default: the stage's.",
    )
    resources: Resources | None = operational(
        None,
        description="The resources of this student's workers. They override the stage's `elastic.resources` key by "
        "key.",
    )

    # Of the pictures; see `Distill.seeing`.
    _num_channels: int = PrivateAttr(RGB)

    @model_validator(mode="before")
    @classmethod
    def _no_shape(cls, data: Any) -> Any:
        known = {field.name for shape in (ViTConfig, ConvNeXtConfig) for field in fields(shape)} - set(
            cls.model_fields
        )
        for key in data if isinstance(data, dict) else ():
            if key in known:
                what, hint = (
                    f"{key} is a setting of the model",
                    f"write model_overrides: {{{key}: {data[key]}}}",
                )
                raise KeyMistakeError(what, key=key, hint=hint)
        return data

    @model_validator(mode="after")
    def _one(self) -> Student:
        places = ("model", *LIBRARIES)
        given = only_one("a student is", {place: getattr(self, place) for place in places})
        if given == "model":
            if self.kwargs:
                raise ValueError(
                    "`kwargs` are for module, timm and transformers: set fields of a model in model_overrides"
                )
            return self
        check_kwargs(self.timm, self.kwargs)
        if self.from_ is not None:
            raise ValueError(
                f"`from` is for `model`: {given} loads its own weights, or starts with random ones"
            )
        for field in ("model_overrides", "drop_path"):
            if getattr(self, field):
                raise ValueError(f"{field} is for `model`: set what {given} has of it in kwargs")
        if self.mask_inputs and "mask_inputs" in self.model_fields_set:
            raise ValueError("mask_inputs is for `model`, which has a mask token: leave it out")
        own = set() if self.optimizer is None else self.optimizer.model_fields_set
        if layered := sorted(own & {"layer_decay", "patch_embed_scale"}):
            raise ValueError(
                f"optimizer.{layered[0]} is for `model`, whose layers are known: leave it out, all weights of "
                f"{given} learn at the full rate"
            )
        return self

    @property
    def tower(self) -> Config | None:
        """The shape of the student, without drop-path; None of a network from elsewhere."""
        return None if self.model is None else preset(self.model, **self.model_overrides)

    @property
    def network(self) -> NetworkSpec | None:
        """What makes the student's network from elsewhere; None if it is one of ours.

        Raises:
            ExtensionError: no installed package has the name of its module.
        """
        channels = self._num_channels
        if self.module is not None:
            path = installed.path_of("teachers", self.module)
            return NetworkSpec("module", path, self.kwargs, num_channels=channels)
        for library, name in (("timm", self.timm), ("transformers", self.transformers)):
            if name is not None:
                return NetworkSpec(library, name, self.kwargs, num_channels=channels)
        return None

    def seeing(self, num_channels: int) -> Student:
        """This student with a first layer for pictures of so many channels."""
        found = self.model_copy()
        if self.model is not None:
            overrides = with_channels(self.model_overrides, num_channels)
            found = self.model_copy(update={"model_overrides": overrides})
        found._num_channels = num_channels
        return found

    @property
    def sees_masks(self) -> bool:
        """Whether it is shown masked crops."""
        return self.mask_inputs and self.model is not None

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """Files whose content decides what network it is, by field."""
        if self.transformers is not None and Path(self.transformers).is_dir():
            return {"transformers": (Path(self.transformers) / "config.json",)}
        return module_files(self.module)

    def check(self, crops: CropConfig, locals_too: bool) -> None:
        """Build a network from elsewhere and see that it can be trained on such crops; nothing else is looked at.

        Args:
            crops: of the student.
            locals_too: whether it sees the local ones.

        Raises:
            UserError: `where` is the field.
        """
        if self.module is not None:
            check_module(self.module)
        if self.timm is not None:
            check_timm(self.timm)
        if self.transformers is not None:
            check_installed("transformers")
        spec = self.network
        if spec is None:
            return
        from orchestrator.models.wrapped_backbone import build_wrapped, ready_to_train

        sizes = (crops.local_size,) if locals_too and crops.num_local else ()
        try:
            ready_to_train(build_wrapped(spec, crops.global_size, 0), *sizes)
        except ValueError as error:
            hint = "give crop sizes that it takes, or wrap it in a module that gives cls and patches"
            raise UserError(f"{spec}: {error}", where=spec.library, hint=hint) from error
