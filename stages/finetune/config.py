"""`finetune`: a trained backbone learns a task from labels; chosen on validation, reported on test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from orchestrator.config.schedules import Momentum, Optimizer, check_warmup
from orchestrator.config.settings import Settings
from orchestrator.config.split import Split
from orchestrator.config.zero_stage import ZeroStage, zero_stage_field
from orchestrator.data.views import Range, Side
from orchestrator.errors import KeyMistakeError, UserError, nearest
from orchestrator.models.configs import Config
from orchestrator.stages.base import Context, Input, PlanContext, TrainStage
from orchestrator.stages.common.config import (
    BACKBONE_KINDS,
    INDEX_KINDS,
    PRECISION,
    READ_BY_WORKERS,
    Precision,
    check_blocks,
)
from orchestrator.stages.common.network_source import NetworkSource
from orchestrator.stages.common.step_fields import (
    OPTIMIZER,
    STEPS,
    batch_size_field,
    block_size_field,
    image_size_field,
)
from orchestrator.stages.common.weights import FROM, From, WeightsSource, files_of, from_field
from orchestrator.stages.finetune.classification import Classification
from orchestrator.stages.finetune.dense import Depth, Segmentation
from orchestrator.stages.finetune.detection import Detection

if TYPE_CHECKING:
    from orchestrator.stages.common.checkpointed import CheckpointedModel


SCORES = "scores.json"


def _task(value: Any) -> Any:
    """The type of a task alone stands for its defaults."""
    return {"type": value} if isinstance(value, str) else value


AnyTask = Annotated[Classification | Segmentation | Depth | Detection, Field(discriminator="type")]
Task = Annotated[AnyTask, BeforeValidator(_task, json_schema_input_type=str | AnyTask)]


class Lora(Settings):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the weights are frozen; at the end the adapters are added to them."""

    rank: int = Field(8, ge=1, le=4096, description="The rank of each adapter.")
    alpha: float = Field(
        16.0,
        gt=0,
        description="The scale of the adapters (LoRA's α): their outputs are multiplied by alpha / rank.",
    )
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("attention",),
        min_length=1,
        description="The linear layers that get adapters: `attention`, `mlp`, or the last part of a layer's name, such "
        "as `qkv` or `q_proj`.",
    )
    vectors: bool = Field(
        False,
        description="Whether the backbone's vectors are trained beside the adapters: biases, the weights of norms and "
        "layer scales.",
    )


class Finetune(TrainStage):
    """A trained backbone with a new head learns from labels.

    The backbone is frozen, trained by low-rank adapters, or trained as a whole, with a smaller learning rate for layers
    further from the output. The weights after the step with the best figure of the validation split are kept. The
    figures that are reported are of the test split, which nothing was chosen by.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["finetune"]
    task: Task = Field(
        description="The task to learn: its type, or a mapping with the type as `type` and its settings."
    )
    split: Split = Field(
        Split(), description="How images are split into those for training, for validation and for test."
    )
    student: str | None = Field(
        None,
        description="The student of the `distill` stage under `needs` that training starts from. It is required if "
        "there is more than one student.",
    )
    from_: From | None = from_field(FROM)
    network: NetworkSource | None = Field(
        None,
        description="The network from elsewhere that training starts from, with its weights: a model of timm or "
        "transformers, or a module. Its BatchNorm layers keep their statistics.",
    )
    mode: Literal["frozen", "lora", "full"] = Field(
        "frozen",
        description="What is trained beside the head. frozen: nothing. lora: low-rank adapters, which are merged into "
        "the weights at the end. full: the whole backbone. `optimizer.layer_decay` lowers the learning rate of layers "
        "further from the output, also that of their adapters.",
    )
    lora: Lora = Field(Lora(), description="The settings of low-rank adapters, for mode lora.")
    steps: int = STEPS
    batch_size: int = batch_size_field()
    block_size: int = block_size_field()
    image_size: Side | None = image_size_field("backbone")
    crop_scale: Range = Field(
        (0.35, 1.0),
        description="The minimum and maximum share of the image's area that a training crop covers, at most 1.",
    )
    flip: bool = Field(
        True, description="Whether training crops are flipped horizontally, with probability 0.5."
    )
    optimizer: Optimizer = OPTIMIZER
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The drop-path rate of the backbone in training: the share of a block's samples that each residual "
        "branch skips, from 0 to below 1. It applies to the modes lora and full, and to backbones of this project.",
    )
    ema: Momentum | None = Field(
        None,
        description="The momentum of the exponential moving average (EMA) of the trained weights by step, from 0 to 1. "
        "The average is what is validated and kept. Default: there is no average.",
    )
    validate_every: int = Field(
        100,
        ge=1,
        description="The interval between evaluations on the whole validation split, in steps, with one more after the "
        "last step. The best weights are chosen among those of these steps.",
    )
    zero_stage: ZeroStage = zero_stage_field()
    precision: Precision = PRECISION

    version: ClassVar[int] = 3
    watched: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = (
        "orchestrator.stages.finetune.blocks",
        "orchestrator.stages.finetune.task",
        "orchestrator.stages.finetune.class_goal",
        "orchestrator.stages.finetune.dense_goals",
        "orchestrator.stages.finetune.detection_goal",
    )
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("index", INDEX_KINDS),
        Input("backbone", (*BACKBONE_KINDS, "distill"), required=False, uncompared=READ_BY_WORKERS),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "model": "the backbone with merged weights and its head, as of the best step",
        "checkpoint": "the elastic checkpoint after the last step",
        "history.json": "figures of every step",
        "validation.json": "figures of the validation split by step",
        SCORES: "figures of the test and the validation split, and the classes",
    }

    @model_validator(mode="after")
    def _fits(self) -> Finetune:
        check_blocks(self, self.batch_size, self.block_size)
        check_warmup("optimizer.lr", self.optimizer.lr, self.steps)
        if self.crop_scale[0] > self.crop_scale[1] or self.crop_scale[1] > 1:
            low, high = self.crop_scale
            raise ValueError(f"crop_scale is {low:g} to {high:g}: give the smaller first, at most 1")
        if self.mode != "lora" and "lora" in self.model_fields_set:
            raise KeyMistakeError(
                f"`lora` is set, but the mode is {self.mode}",
                key="lora",
                hint="write `mode: lora`, or leave it out",
            )
        if self.mode == "frozen" and self.drop_path:
            raise KeyMistakeError(
                "a frozen backbone has no drop-path",
                key="drop_path",
                hint="leave it out, or choose another mode",
            )
        if self.from_ is not None and self.network is not None:
            raise KeyMistakeError(
                "the backbone starts from `from` or from `network`, and both are given",
                key="network",
                hint="leave one of them out",
            )
        if self.network is not None:
            _check_network(self.network)
        if not self.task.needs_index and "split" in self.model_fields_set:
            raise KeyMistakeError(
                f"the task {self.task.type} has a data set of its own",
                key="split",
                hint="write the split as `task: {data: {split: …}}`, or leave it out",
            )
        return self

    # --- what it takes ------------------------------------------------------------------------------------------

    def models(self) -> Mapping[str, str]:
        """See :meth:`Stage.models`."""
        return {"": "model"}

    def checkpointed(self, context: Context) -> Mapping[str, CheckpointedModel]:
        """See :class:`Stage`."""
        from orchestrator.stages.finetune.checkpointed import checkpointed_model

        return {"": checkpointed_model(self, context, SCORES)}

    def labels_from(self) -> Split | None:
        """See :class:`Stage`."""
        return self.split if self.task.needs_index else None

    def learned_task(self) -> str | None:
        """See :class:`Stage`."""
        return self.task.type

    def learned_data(self) -> Any:
        """See :class:`Stage`."""
        return None if isinstance(self.task, Classification) else self.task.dataset

    def wants(self) -> tuple[Input, ...]:
        """See :class:`Stage`: a task with a data set of its own takes no index."""
        return self.inputs if self.task.needs_index else self.inputs[1:]

    def starts_from(self) -> Mapping[str, WeightsSource]:
        """See :class:`Stage`."""
        return {"from": self.from_} if self.from_ is not None else {}

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Stage`."""
        network = self.network.files() if self.network is not None else {}
        return {
            **files_of(self.starts_from()),
            **{f"network.{field}": paths for field, paths in network.items()},
            **{f"split.{field}": paths for field, paths in self.split.files().items()},
            **{f"task.{field}": paths for field, paths in self.task.files().items()},
        }

    def modules(self) -> tuple[str, ...]:
        """See :class:`Stage`."""
        return () if self.network is None or self.network.module is None else (self.network.path,)

    def num_exports(self) -> int:
        """See :class:`TrainStage`: the weights after every look at the validation split."""
        return len(self.validation_steps())

    def check(self) -> None:
        """See :class:`Stage`: whether the weights can be read, the network is there, and targets fit their pictures."""
        self.task.check()
        if self.from_ is not None and self.from_.is_there():
            self.from_.check(None, {})
        if self.network is not None:
            try:
                self.network.check(self.image_size or self.network.size or 0)
            except UserError as error:
                raise UserError(error.what, where=f"network.{error.where}", hint=error.hint) from None

    def preflight(self, plan_context: PlanContext) -> list[UserError]:
        """See :class:`Stage`: no backbone or two, no such student, a size that it cannot take, no labels."""
        stage = plan_context.upstream.get("backbone")
        given = [
            name for name in ("from", "network") if getattr(self, name.replace("from", "from_")) is not None
        ]
        if stage is None and not given:
            what = "there is no trained backbone to start from"
            hint = "put the stage that trains it in `needs`, or set `from` or `network`"
            return [UserError(what, where="needs", hint=hint)]
        if stage is not None and given:
            what = (
                f"the backbone starts from `{given[0]}` or from the stage under `needs`, and both are given"
            )
            return [UserError(what, where=given[0], hint="leave one of them out")]
        found = [*self._preflight_student(plan_context), *self._preflight_size(plan_context)]
        mistake = None if plan_context.photos is None else self.task.preflight(plan_context.photos)
        return found if mistake is None else [*found, mistake]

    def _preflight_student(self, plan_context: PlanContext) -> list[UserError]:
        stage = plan_context.upstream.get("backbone")
        names = sorted(stage.student_towers()) if stage is not None else []
        if self.student is None and len(names) < 2:
            return []
        if self.student in names:
            return []
        close = nearest(self.student or "", names)
        if not names:
            what = f"there is no student {self.student!r}: the backbone was not distilled into students"
            hint = "leave out `student`, or put the `distill` stage in `needs`"
        elif self.student is None:
            what, hint = "`student` is not set, and there is more than one", f"use one of {', '.join(names)}"
        else:
            what = f"there is no student {self.student!r}"
            hint = f"use student: {close}" if close else f"use one of {', '.join(names)}"
        return [UserError(what, where="student", hint=hint)]

    def _preflight_size(self, plan_context: PlanContext) -> list[UserError]:
        shape = self.tower(plan_context.upstream)
        if shape is None or self.image_size is None or self.image_size % shape.patch_size == 0:
            return []
        near = max(1, round(self.image_size / shape.patch_size)) * shape.patch_size
        what = (
            f"image_size {self.image_size} is not a multiple of the backbone's patch size {shape.patch_size}"
        )
        return [UserError(what, where="image_size", hint=f"use {near}")]

    def tower(self, upstream: Mapping[str, Any]) -> Config | None:
        """The shape of the backbone, as far as the pipeline file and weights that are there say it.

        Args:
            upstream: the stages that fill the inputs, by role, and `origin`.
        """
        if self.from_ is not None:
            found = self.from_.model({})
            if found is None:
                return None
            from orchestrator.models.presets import preset

            return preset(found[0], **found[1])
        stage = upstream.get("backbone")
        towers = stage.student_towers() if stage is not None else {}
        if towers:
            name = self.student or (next(iter(towers)) if len(towers) == 1 else "")
            return towers.get(name)
        recipe = upstream["origin"].model_recipe() if "origin" in upstream else None
        return recipe.tower if recipe is not None else None

    # --- running ------------------------------------------------------------------------------------------------

    def validation_steps(self) -> tuple[int, ...]:
        """The steps after which the validation split is looked at; the last one is always among them."""
        return (*range(self.validate_every, self.steps, self.validate_every), self.steps)

    def run(self, context: Context) -> Mapping[str, float]:
        """Train, choose the best step on validation, report it on test; leave the model.

        Raises:
            UserError: labels or splits that cannot be used, a backbone that is not there, or a size it cannot take.
            Stopped: on request, checkpointed.
        """
        from orchestrator.stages.finetune.run import run_finetune

        return run_finetune(self, context)


def _check_network(network: NetworkSource) -> None:
    """Raises KeyMistakeError for settings of a network that only a frozen teacher has."""
    if network.from_ is not None:
        raise KeyMistakeError(
            "weights of this project's backbones are given as `from` of the stage",
            key="network.from",
            hint="write `from: …` in place of `network: {from: …}`",
        )
    for field in ("block", "cls_block", "patch_block"):
        if getattr(network, field) is not None:
            raise KeyMistakeError(
                "a network is trained up to its last block", key=f"network.{field}", hint="leave it out"
            )
    if network.bands is not None:
        raise KeyMistakeError(
            "a network that is trained sees all bands of the pictures",
            key="network.bands",
            hint="name them as `bands` of the data's `pixels`",
        )
