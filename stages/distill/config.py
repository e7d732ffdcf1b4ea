"""`distill`: one frozen teacher, any number of students, each its own elastic job and its own artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, StringConstraints, model_validator

from orchestrator.config.extension import versions
from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schedules import Momentum, Optimizer, Schedule, check_warmup, moving
from orchestrator.config.settings import in_key_if_set, operational, with_new_keys
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.models.configs import RGB, Config
from orchestrator.stages.base import Context, Input, Stage
from orchestrator.stages.common.config import (
    BACKBONE_KINDS,
    INDEX_KINDS,
    UNREAD,
    check_crops,
)
from orchestrator.stages.common.mixing import DRAWN, DRAWN_MEANS
from orchestrator.stages.common.multi_crop import MultiCropStage
from orchestrator.stages.common.weights import (
    WeightsSource,
    check_frozen,
    files_of,
)
from orchestrator.stages.distill.features import OWN, FeatureObjective
from orchestrator.stages.distill.student_config import Student
from orchestrator.units import size

if TYPE_CHECKING:
    from orchestrator.stages.common.checkpointed import CheckpointedModel

# Names folders, runs and models.
StudentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

# Before the name of a student, in the dotted name of a field.
_STUDENTS = "students."
_STAGE_ONLY = ("kind", "needs", "students")
# Of a number in a teacher's outputs, in fp32.
_NUMBER_BYTES = 4


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
        description="The momentum of each student's EMA by step, from 0 to 1 (DINOv3's published code: 0.994 to 1). "
        "The EMA weights are the ones that are exported.",
    )
    teacher_temperature: float = Field(
        0.07,
        gt=0,
        description="The temperature of the teacher's targets (DINOv3's published code: 0.07).",
    )
    local_weight: float = Field(
        1.0, ge=0, description="The weight of the DINO loss on local crops (DINOv3's published code: 1)."
    )
    window: int = operational(
        4,
        ge=2,
        description="The prefetch window: the number of teacher steps whose outputs are kept for the slowest student. "
        "At least the number of teachers plus 1 is used.",
    )
    workers: Literal["auto"] | None = operational(
        None,
        description="How devices are split between teachers and students. auto splits them by measured costs so that "
        "all finish at the same time, and again whenever the cluster changes. Default: each student has its own "
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
    teacher_cache: bool = operational(
        False,
        description="Whether the teacher's outputs are saved in the store for students that are trained later.",
    )

    teacher_bands: tuple[Annotated[int, Field(ge=0)], ...] | None = in_key_if_set(
        None,
        min_length=1,
        description="The bands of the pictures that the teacher of the stage under `needs` sees, counted from 0 in the "
        "files, such as [2, 1, 0] for a teacher of photos. Students see all bands. Default: the teacher sees all "
        "bands, too.",
    )

    # How pictures are seen, once that is known; see `seeing`.
    _pixels: PixelFormat | None = PrivateAttr(None)
    _is_told: bool = PrivateAttr(False)

    version: ClassVar[int] = 2
    renamed: ClassVar[Mapping[str, str]] = {"replay": "teacher_cache"}
    watched: ClassVar[bool] = True
    preload: ClassVar[tuple[str, ...]] = ("orchestrator.stages.distill.task",)
    inputs: ClassVar[tuple[Input, ...]] = (
        Input("index", INDEX_KINDS),
        Input("teacher", BACKBONE_KINDS, uncompared=UNREAD),
    )
    outputs: ClassVar[Mapping[str, str]] = {
        "students": "one folder per student: model/ (EMA), recipe.json, history.json, and in artifact.json the key of "
        "the artifact that has its checkpoint too",
        "sharing.json": "what the teacher computed and handed out",
        DRAWN: DRAWN_MEANS,
    }

    @model_validator(mode="before")
    @classmethod
    def _old_keys(cls, values: Any) -> Any:
        return with_new_keys(values, cls.renamed)

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
        if self.teacher_shards > 1 and self.teacher_cache:
            raise ValueError("teacher_cache and teacher_shards cannot be combined: leave one of them out")
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

    def seeing(self, pixels: PixelFormat | None) -> Distill:
        """See :class:`Stage`: students have a channel for each band."""
        channels = pixels.num_channels if pixels is not None else RGB
        students = {name: student.seeing(channels) for name, student in self.students.items()}
        found = self.model_copy(update={"students": students})
        found._pixels, found._is_told = pixels, True
        return found

    @property
    def pixels(self) -> PixelFormat | None:
        """How the pictures are seen; None for 8-bit RGB, or where it is not known."""
        return self._pixels

    def own_channels(self, num_channels: int) -> tuple[int, ...] | None:
        """The channels of the pictures that the stage's own teacher sees; None for all.

        Args:
            num_channels: that it takes.

        Raises:
            UserError: the pictures have others.
        """
        seen = self._pixels or PixelFormat()
        try:
            chosen = None if self.teacher_bands is None else seen.channels_of(self.teacher_bands)
        except ValueError as error:
            raise UserError(
                str(error), where="teacher_bands", hint="name bands of the data's `pixels`"
            ) from None
        count = seen.num_channels if chosen is None else len(chosen)
        if count != num_channels:
            raise UserError(
                f"the teacher takes {num_channels} channels, and would see {count}",
                where="teacher_bands",
                hint=f"name the {num_channels} bands that it sees, such as {list(range(num_channels))[::-1]}",
            )
        return chosen

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
        seen = self._pixels or PixelFormat()
        bytes_a_pixel = seen.num_channels * (2 if seen.is_deep else 1)
        return self.batch_size * sum(sizes.values()) * bytes_a_pixel // RGB

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
        """See :class:`TrainStage`: with `teacher_cache` the teacher's outputs of all steps, but for small ones.

        Of teachers from elsewhere it is not known before they are opened.
        """
        from orchestrator.stages.common.flops import feature_dim, masked_share

        recipe = origin.model_recipe() if origin is not None else None
        if recipe is None or not self.teacher_cache:
            return 0.0
        crops, tower, heads = self.crops, recipe.tower, recipe.heads
        patches = (crops.global_size // tower.patch_size) ** 2
        if self.features is not None:
            rows = self.features.terms_of(OWN).rows(patches)
            width = feature_dim(tower) * rows if self.features.uses_own else 0
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
            f"{held} steps of {size(step_bytes)} each are kept at the same time, and the object store has {size(room)}",
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

    def checkpointed(self, context: Context) -> Mapping[str, CheckpointedModel]:
        """See :class:`Stage`."""
        from orchestrator.stages.distill.checkpointed import checkpointed_students

        return checkpointed_students(self, context)

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
                if self._is_told:
                    self.features.check_channels(self._pixels)
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
