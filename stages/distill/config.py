"""`distill`: one frozen teacher, any number of students, each its own elastic job and its own artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from orchestrator import installed
from orchestrator.config.elastic import Resources, Workers
from orchestrator.config.extension import versions
from orchestrator.config.schedules import Momentum, Optimizer, Schedule, check_warmup, moving
from orchestrator.config.settings import Settings, in_key_if_set, only_one, operational
from orchestrator.config.zero_stage import ZeroStage, zero_stage_field
from orchestrator.data.views import MAX_VIEWS, CropConfig, Side
from orchestrator.errors import KeyMistakeError, UserError
from orchestrator.models.configs import Config, ConvNeXtConfig, ViTConfig
from orchestrator.models.network_spec import LIBRARIES, NetworkSpec
from orchestrator.models.presets import preset
from orchestrator.stages.base import Context, Input, Stage
from orchestrator.stages.common.config import (
    BACKBONE_KINDS,
    INDEX_KINDS,
    OVERRIDES,
    OptionalModelName,
    Overrides,
    Precision,
    check_crops,
)
from orchestrator.stages.common.mixing import DRAWN, DRAWN_MEANS
from orchestrator.stages.common.multi_crop import MultiCropStage
from orchestrator.stages.common.network_source import (
    MODULE,
    check_installed,
    check_kwargs,
    check_module,
    check_timm,
    module_files,
)
from orchestrator.stages.common.weights import (
    FROM,
    From,
    WeightsSource,
    check_frozen,
    files_of,
    freeze_field,
    from_field,
)
from orchestrator.stages.distill.features import FeatureObjective

# Names folders, runs and models.
StudentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

# Before the name of a student, in the dotted name of a field.
_STUDENTS = "students."
_STAGE_ONLY = ("kind", "needs", "students")
# Of a number in a teacher's outputs, in fp32.
_NUMBER_BYTES = 4


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
    module: str | None = in_key_if_set(
        None,
        pattern=MODULE,
        description="A callable that returns the student's backbone as an nn.Module, as package.module:callable, or by "
        "the name of an installed package's entry point. It gives what a teacher's module gives.",
    )
    timm: str | None = in_key_if_set(
        None,
        min_length=1,
        description="The name of a timm model, which the student has with random weights. timm must be installed.",
    )
    transformers: str | None = in_key_if_set(
        None,
        min_length=1,
        description="The name or local folder of a transformers model, which the student has with random weights. "
        "transformers must be installed.",
    )
    kwargs: dict[str, Any] = in_key_if_set(
        {},
        description="Arguments of the callable of `module`, or settings of the model of timm or transformers, by name.",
    )
    from_: From | None = from_field(FROM)
    freeze_backbone_steps: int = freeze_field()
    drop_path: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The drop-path rate: the share of a batch's samples that each residual branch skips, from 0 to 1. "
        "Only for `model`; other networks have it in `kwargs`.",
    )
    optimizer: Optimizer | None = Field(
        None, description="The settings of AdamW for this student. Default: the stage's."
    )
    ema: Schedule | None = Field(
        None, description="The momentum of this student's EMA by step. Default: the stage's."
    )
    mask_inputs: bool = Field(
        True,
        description="Whether the student sees masked global crops, as in the paper. The published code shows it "
        "unmasked crops. Only for `model`: other networks have no mask token and see unmasked crops.",
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
        if self.module is not None:
            return NetworkSpec("module", installed.path_of("teachers", self.module), self.kwargs)
        if self.timm is not None:
            return NetworkSpec("timm", self.timm, self.kwargs)
        return (
            None if self.transformers is None else NetworkSpec("transformers", self.transformers, self.kwargs)
        )

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


class Distill(MultiCropStage):
    """Multi-student distillation (arXiv 2508.10104, section 5.2).

    The losses are those of pretraining, with a frozen teacher instead of the EMA teacher. The teacher's forward pass
    is computed once per step for all students.
    """

    kind: Literal["distill"]
    students: dict[StudentName, Student] = Field(min_length=1, description="The students by name.")
    steps: int = Field(ge=1, description="The number of optimizer steps. A student can override it.")
    batch_size: int = Field(ge=1, description="The number of images per step, the same for all students.")
    features: FeatureObjective | None = Field(
        None,
        description="The objective for teachers without heads: students regress the teacher's features. Default: "
        "students learn the outputs of the teacher's DINO and iBOT heads.",
    )
    optimizer: Optimizer = Field(
        description="The settings of AdamW, with its learning rate schedule. A student can override them."
    )
    ema: Momentum = Field(
        Schedule(peak=0.994, end=1.0, shape="cosine"),
        description="The momentum of each student's EMA by step, from 0 to 1. The EMA weights are the ones that are "
        "exported.",
    )
    teacher_temperature: float = Field(0.07, gt=0, description="The temperature of the teacher's targets.")
    local_weight: float = Field(1.0, ge=0, description="The weight of the DINO loss on local crops.")
    window: int = operational(
        4,
        ge=2,
        description="The prefetch window: the number of teacher steps whose outputs are kept for the slowest student. "
        "At least the number of teachers plus 1 is used.",
    )
    workers: Literal["auto"] | None = operational(
        None,
        description="The split of devices. auto splits them between teachers and students, from measured costs, so "
        "that all finish at the same time, and again whenever the cluster changes. Default: each student has its own "
        "`workers`.",
    )
    teachers: int | Literal["auto"] = operational(
        "auto",
        description="The number of teacher actors. Each computes whole steps. auto is 1, or follows from `workers: "
        "auto`.",
    )
    teacher_shards: int = operational(
        1,
        ge=1,
        description="The number of processes that each teacher is sharded over. They run on one machine, each with "
        "`teacher_gpus`.",
    )
    teacher_threads: int = operational(
        1,
        ge=1,
        description="The number of threads per teacher actor that prefetch the views of the next step.",
    )
    teacher_gpus: float = operational(
        0.1,
        gt=0,
        le=1024,
        description="The number of GPUs per teacher process: a whole number, or a fraction below 1. It is ignored if "
        "there are no GPUs.",
    )
    views: Literal["shared", "regenerated"] = operational(
        "shared",
        description="The origin of the students' crops. shared: the teacher makes them once and sends them to all "
        "students. regenerated: each student's workers make the same crops again from the seed.",
    )
    replay: bool = operational(
        False,
        description="Whether the teacher's outputs are saved in the store for students that are trained later.",
    )

    preload: ClassVar[tuple[str, ...]] = ("orchestrator.stages.distill.task",)
    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS), Input("teacher", BACKBONE_KINDS))
    outputs: ClassVar[Mapping[str, str]] = {
        "students": "a folder a student: model/ (EMA), recipe.json, history.json, and in artifact.json the key of "
        "the artifact that has its checkpoint too",
        "sharing.json": "what the teacher computed and handed out",
        DRAWN: DRAWN_MEANS,
    }

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        if isinstance(self.teachers, int) and self.teachers < 1:
            raise ValueError(f"teachers is {self.teachers}: at least 1 is needed")
        if self.teacher_shards > 1 and self.features is not None:
            raise ValueError(
                "teacher_shards is only for teachers with heads: leave it out, or leave out `features`"
            )
        if self.repeat_after is not None and self.views == "regenerated":
            raise ValueError(
                "features.repeat_after and views: regenerated cannot be combined: leave one of them out"
            )
        if self.teacher_shards > 1 and self.replay:
            raise ValueError("replay and teacher_shards cannot be combined: leave one of them out")
        for name, student in self.students.items():
            at = "crops" if student.views is None else f"students.{name}.views"
            if student.model is not None:
                check_crops(self.crops_of(student), student.model, student.model_overrides, at)
            steps = self.steps_of(student)
            check_frozen(student.freeze_backbone_steps, student.from_, steps, f"students.{name}.")
            own = student.optimizer is not None
            optimizer = student.optimizer or self.optimizer
            check_warmup(
                f"students.{name}.optimizer.lr" if own else "optimizer.lr",
                optimizer.lr,
                steps,
            )
        return self

    def crops_at(self, step: int, seed: int) -> CropConfig:
        """The views of `step`: the same in all."""
        return self.crops

    def crops_of(self, student: Student) -> CropConfig:
        """A student's views."""
        own = student.views.model_dump(exclude_none=True) if student.views is not None else {}
        return self.crops.model_copy(update=own)

    @property
    def sees_locals(self) -> bool:
        """Whether students learn from local crops, too, if there are any."""
        return self.features is None or self.features.local_weight > 0

    @property
    def repeat_after(self) -> int | None:
        """The number of steps after which views come again, if they do."""
        return self.features.repeat_after if self.features is not None else None

    @property
    def num_teachers(self) -> int:
        """Teacher actors at the start."""
        return self.teachers if isinstance(self.teachers, int) else 1

    def window_of(self, teachers: int) -> int:
        """Steps that are held while so many teachers are at work: one more than they are, or nobody would have any."""
        return max(self.window, teachers + 1)

    def view_bytes(self, students: Iterable[Student]) -> int:
        """Of these students' views in one step, as far as teachers make them; what teachers say comes on top."""
        if self.views == "regenerated":
            return 0
        sizes = {
            crops.model_dump_json(): crops.num_bytes for crops in (self.crops_of(one) for one in students)
        }
        return self.batch_size * sum(sizes.values())

    def num_exports(self) -> int:
        """See :class:`TrainStage`: a student's model is in its own artifact and in its stage's."""
        return 2

    def student_towers(self) -> Mapping[str, Config | None]:
        """See :meth:`Stage.student_towers`."""
        return {name: student.tower for name, student in self.students.items()}

    def held_bytes(self) -> float:
        """See :class:`TrainStage`: the views of a window; a worker may be a step behind the others."""
        return float((self.window_of(self.num_teachers) + 1) * self.view_bytes(self.students.values()))

    def kept_bytes(self, origin: Stage | None) -> float:
        """See :class:`TrainStage`: with `replay` the teacher's outputs of all steps, but for what is small in them.

        Of teachers from elsewhere it is not known before they are opened.
        """
        from orchestrator.stages.common.flops import feature_dim, masked_share

        recipe = origin.model_recipe() if origin is not None else None
        if recipe is None or not self.replay:
            return 0.0
        crops, tower, heads = self.crops, recipe.tower, recipe.heads
        patches = (crops.global_size // tower.patch_size) ** 2
        if self.features is not None:
            width = feature_dim(tower) * (1 + patches) if self.features.uses_own else 0
        else:
            masked = masked_share(self.mask_probability, self.mask_ratio, self.block_size * crops.num_global)
            width = heads.dino_bottleneck + round(masked * patches) * heads.ibot_bottleneck
        steps = max(self.steps_of(student) for student in self.students.values())
        return float(_NUMBER_BYTES * steps * self.batch_size * crops.num_global * width)

    def check_room(self, window: int, step_bytes: int, room: float, where: str) -> None:
        """See that a window of such steps fits into an object store of `room` bytes.

        Raises:
            UserError: it does not.
        """
        held = window + 1  # a worker may be a step behind the others
        if held * step_bytes <= room:
            return
        fits = int(room // step_bytes) - 1
        raise UserError(
            f"{held} steps of {step_bytes / 1e9:.3g} GB each are kept at the same time, and the object store has "
            f"{room / 1e9:.3g} GB",
            where=where,
            hint=f"set window to {fits}" if fits >= 2 else "set views: regenerated, or a smaller batch_size",
        )

    def check_shards(self, gpus: float, where: str) -> None:
        """See that the processes of one teacher have a GPU each on a cluster with `gpus`: NCCL connects them.

        Raises:
            UserError: two would be on one.
        """
        if gpus and self.teacher_shards > 1 and self.teacher_gpus < 1:
            raise UserError(
                f"{self.teacher_shards} processes of one teacher, on {self.teacher_gpus:g} of a GPU each, would be on "
                "one GPU: NCCL needs a GPU of its own for each",
                where=where,
                hint="set teacher_gpus: 1, or teacher_shards: 1",
            )

    def ema_of(self, student: Student) -> Schedule:
        """The momentum of a student's average."""
        return student.ema or self.ema

    def steps_of(self, student: Student) -> int:
        """A student's number of updates."""
        return student.steps or self.steps

    def tied_to_steps(self) -> Mapping[tuple[str, ...], tuple[str, ...]]:
        """See :class:`Stage`: of each student."""
        return {("students", name, "steps"): self.student_tied_to_steps(name) for name in self.students}

    def student_tied_to_steps(self, name: str) -> tuple[str, ...]:
        """The fields of one student, or of the stage, whose schedules move until its last step."""
        student = self.students[name]
        own = f"{_STUDENTS}{name}."
        optimizer = student.optimizer or self.optimizer
        at = own if student.optimizer is not None else ""
        return moving(
            {
                f"{at}optimizer.lr": optimizer.lr,
                f"{at}optimizer.weight_decay": optimizer.weight_decay,
                f"{own if student.ema is not None else ''}ema": self.ema_of(student),
            }
        )

    def student_identity(self, name: str) -> dict[str, Any]:
        """All in this config that decides one student, and nothing of the others."""
        stage = {field: value for field, value in self.identity().items() if field not in _STAGE_ONLY}
        student = self.students[name]
        brought = versions(self.model_copy(update={"students": {}})) | versions(student)
        own = {"extensions": brought} if brought else {}
        return {**stage, "name": name, "student": student.identity(), **own}

    def models(self) -> Mapping[str, str]:
        """See :meth:`Stage.models`."""
        return {name: f"students/{name}/model" for name in self.students}

    def wants(self) -> tuple[Input, ...]:
        """See :class:`Stage`: teachers from elsewhere need no stage that made them."""
        elsewhere = self.features is not None and not self.features.uses_own
        return tuple(wanted for wanted in self.inputs if not (elsewhere and wanted.role == "teacher"))

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Stage`."""
        found = {
            f"{_STUDENTS}{name}.{field}": paths
            for name, student in self.students.items()
            for field, paths in student.files().items()
        }
        if self.features is not None:
            found |= {f"features.{field}": paths for field, paths in self.features.files().items()}
        return found | files_of(self.starts_from())

    def concerns(self, field: str, part: Mapping[str, Any]) -> bool:
        """See :class:`Stage`: the files of one student are nothing to the others, nor to the teachers."""
        return not field.startswith(_STUDENTS) or field.startswith(f"{_STUDENTS}{part.get('name')}.")

    def modules(self) -> tuple[str, ...]:
        """See :class:`Stage`."""
        specs = [student.network for student in self.students.values()]
        return tuple(spec.name for spec in specs if spec is not None and spec.library == "module")

    def starts_from(self) -> Mapping[str, WeightsSource]:
        """See :class:`Stage`."""
        return {
            f"{_STUDENTS}{name}.from": student.from_
            for name, student in self.students.items()
            if student.from_ is not None
        }

    def check(self) -> None:
        """See :class:`Stage`."""
        super().check()
        if self.features is not None:
            try:
                self.features.check(self.crops)
            except UserError as error:
                raise UserError(error.what, where=f"features.{error.where}", hint=error.hint) from None
        for name, student in self.students.items():
            try:
                student.check(self.crops_of(student), self.sees_locals)
                if student.from_ is not None and student.from_.is_there():
                    student.from_.check(student.model, student.model_overrides)
            except UserError as error:
                where = f"{_STUDENTS}{name}.{error.where}"
                raise UserError(error.what, where=where, hint=error.hint) from None

    def run(self, context: Context) -> Mapping[str, float]:
        """Train all students beside one teacher; one that fails does not stop the others."""
        from orchestrator.stages.distill.students import train

        return train(self, context)
