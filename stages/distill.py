"""`distill`: one frozen teacher, any number of students, each its own elastic job and its own artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from orchestrator.data.views import MAX_VIEWS, CropConfig, Side
from orchestrator.errors import UserError
from orchestrator.extension import versions
from orchestrator.models.configs import Config
from orchestrator.models.presets import preset
from orchestrator.spec import (
    Momentum,
    Optimizer,
    Resources,
    Schedule,
    Settings,
    Share,
    Workers,
    check_ratio,
    check_warmup,
    operational,
)
from orchestrator.stages.base import Context, Input, Stage
from orchestrator.stages.features import FeatureObjective
from orchestrator.stages.mixing import DRAWN, DRAWN_MEANS, HomogeneousMixStage
from orchestrator.stages.selfsup import (
    BACKBONE_KINDS,
    INDEX_KINDS,
    KOLEO_GROUP,
    KOLEO_VIEWS,
    OVERRIDES,
    KoLeoViews,
    ModelName,
    Overrides,
    check_crops,
    check_group,
)

# Names folders, runs and models.
StudentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]

_STAGE_ONLY = ("kind", "needs", "students")
# Of what a teacher says, in fp32.
_NUMBER_BYTES = 4


class Views(Settings):
    """A student's own sizes of the views: cut from the same boxes as the stage's, with the same colours."""

    global_size: Side = Field(description="The side of this student's global crops, in pixels.")
    local_size: Side | None = Field(
        None, description="The side of its local crops, in pixels. Default: the stage's."
    )
    num_local: int | None = Field(
        None, ge=0, le=MAX_VIEWS, description="The number of its local crops. Default: the stage's."
    )


class Student(Settings):
    """One student. Its heads have the teacher's prototypes and the sizes of the teacher's heads."""

    model: ModelName = Field(description="The student's backbone, by its name in `orchestrator models`.")
    model_overrides: Overrides = Field({}, description=OVERRIDES)
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="The share of a batch's rows that each residual branch leaves out."
    )
    optimizer: Optimizer | None = Field(
        None, description="The student's own AdamW and learning rate. Default: the stage's."
    )
    ema: Schedule | None = Field(None, description="The student's own ema. Default: the stage's.")
    mask_inputs: bool = Field(
        True,
        description="Whether the student sees masked crops, as in the paper, or whole ones, as in the published "
        "code.",
    )
    views: Views | None = Field(
        None, description="The student's own sizes of the views. Default: the stage's crops."
    )
    steps: int | None = Field(
        None, ge=1, description="The student's own number of updates. Default: the stage's."
    )
    joins: Literal["start", "now"] = Field(
        "start",
        description="Where the student begins: at the teacher's first step, computed again if need be (`start`), "
        "or at the step at which the other students are when it first starts (`now`).",
    )
    precision: Literal["auto", "fp32", "bf16"] | None = Field(
        None, description="The student's own precision of training. Default: the stage's."
    )
    zero_stage: Literal[1, 2, 3] = operational(
        3, description="The ZeRO stage that DeepSpeed trains the student with. In bf16, 1 is 2."
    )
    workers: Workers | None = operational(
        None, description="The student's own `elastic.workers`. Default: the stage's."
    )
    resources: Resources | None = operational(
        None, description="The student's own `elastic.resources`. A key that is left out is the stage's."
    )

    @property
    def tower(self) -> Config:
        """The shape of the student, without drop-path."""
        return preset(self.model, **self.model_overrides)


class Distill(HomogeneousMixStage):
    """Multi-student distillation (arXiv 2508.10104, section 5.2): the pretraining losses with the frozen teacher in
    the place of the EMA; its forward is computed once a step for all students.
    """

    kind: Literal["distill"]
    students: dict[StudentName, Student] = Field(min_length=1, description="The students by name.")
    steps: int = Field(ge=1, description="The number of updates of a student that does not say its own.")
    batch_size: int = Field(ge=1, description="The number of images of a step, the same for all students.")
    block_size: int = Field(
        16,
        ge=2,
        description="The number of images of a block, which is never divided between workers; it divides "
        "`batch_size`.",
    )
    crops: CropConfig = Field(CropConfig(), description="The views of an image.")
    features: FeatureObjective | None = Field(
        None,
        description="What students learn of headless teachers. Default: they learn the heads of the teacher's "
        "artifact.",
    )
    optimizer: Optimizer = Field(
        description="AdamW and its learning rate, of students that do not say their own."
    )
    ema: Momentum = Field(
        Schedule(peak=0.994, end=1.0, shape="cosine"),
        description="The momentum of a student's EMA by step; the EMA is what is exported.",
    )
    student_temperature: float = Field(0.1, gt=0, description="The temperature of the student's softmax.")
    teacher_temperature: float = Field(0.07, gt=0, description="The temperature of the teacher's targets.")
    local_weight: float = Field(1.0, ge=0, description="The weight of the DINO loss of local crops.")
    ibot_weight: float = Field(1.0, ge=0, description="The weight of the iBOT loss.")
    koleo_weight: float = Field(0.1, ge=0, description="The weight of the KoLeo loss.")
    koleo_views: KoLeoViews = KOLEO_VIEWS
    koleo_group: int | None = KOLEO_GROUP
    mask_ratio: tuple[Share, Share] = Field(
        (0.1, 0.5),
        description="The smallest and the largest share of masked patches in a crop that is masked.",
    )
    mask_probability: float = Field(
        0.5, ge=0, le=1, description="The share of the global crops that are masked."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="The precision of training: auto is bf16 on GPUs that have it, else fp32."
    )
    chunk_rows: int | None = operational(
        None,
        ge=1,
        description="The number of rows whose logits are held in memory at once. Another number changes results in "
        "their last bits, also with `elastic.exact`, and re-runs nothing all the same. Default: all rows of a block.",
    )
    window: int = operational(
        4, ge=2, description="The number of teacher steps that are held for the slowest student."
    )
    workers: Literal["auto"] | None = operational(
        None,
        description="How devices are split: auto splits them between teachers and students so that all finish "
        "together, from costs measured on them, and again whenever the cluster changes. Default: each "
        "student has its own range.",
    )
    teachers: int | Literal["auto"] = operational(
        "auto",
        description="The number of teacher actors, each of which computes whole steps. auto is 1, or what "
        "`workers: auto` finds.",
    )
    teacher_shards: int = operational(
        1,
        ge=1,
        description="The number of processes on one machine, each with `teacher_gpus`, that one teacher is sharded "
        "over.",
    )
    teacher_threads: int = operational(
        1,
        ge=1,
        description="The number of threads of a teacher actor that make the next step's views beside its forward.",
    )
    teacher_gpus: float = operational(
        0.1,
        gt=0,
        le=1024,
        description="The share or number of GPUs that each process of a teacher takes, where there are any.",
    )
    views: Literal["shared", "regenerated"] = operational(
        "shared",
        description="Who makes the views: `shared`, the teachers once for all students, or `regenerated`, each "
        "student's workers from the seed.",
    )
    replay: bool = operational(
        False,
        description="Whether the teacher's outputs are kept in the store, for students that are trained later.",
    )

    preload: ClassVar[tuple[str, ...]] = ("orchestrator.stages.tasks.distill",)
    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS), Input("teacher", BACKBONE_KINDS))
    outputs: ClassVar[Mapping[str, str]] = {
        "students": "a folder a student: model/ (EMA), recipe.json, history.json, and in artifact.json the key of "
        "the artifact that has its checkpoint too",
        "sharing.json": "what the teacher computed and handed out",
        DRAWN: DRAWN_MEANS,
    }

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        if self.batch_size % self.block_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of block_size {self.block_size}"
            )
        if isinstance(self.teachers, int) and self.teachers < 1:
            raise ValueError(f"teachers is {self.teachers}: at least 1 has to teach")
        if self.teacher_shards > 1 and self.features is not None:
            raise ValueError("teacher_shards is for teachers with heads: leave it out beside `features`")
        if self.teacher_shards > 1 and self.replay:
            raise ValueError("replay and teacher_shards do not go together: leave one of them out")
        check_group(self.koleo_group, self.block_size)
        check_ratio("mask_ratio", self.mask_ratio)
        for name, student in self.students.items():
            check_crops(self.crops_of(student), student.model, student.model_overrides)
            own = student.optimizer is not None
            optimizer = student.optimizer or self.optimizer
            check_warmup(
                f"students.{name}.optimizer.lr" if own else "optimizer.lr",
                optimizer.lr,
                self.steps_of(student),
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

    def held_bytes(self) -> float:
        """See :class:`TrainStage`: the views of a window; a worker may be a step behind the others."""
        return float((self.window_of(self.num_teachers) + 1) * self.view_bytes(self.students.values()))

    def kept_bytes(self, origin: Stage | None) -> float:
        """See :class:`TrainStage`: with `replay` what the teacher says in all steps, but for what is small in it.

        Of teachers from elsewhere it is not known before they are opened.
        """
        from orchestrator.stages.operations import feature_dim, masked_share
        from orchestrator.stages.pretrain import Pretrain

        if not (self.replay and isinstance(origin, Pretrain)):
            return 0.0
        crops, tower, heads = self.crops, origin.tower, origin.heads
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
            f"{held} steps of {step_bytes / 1e9:.3g} GB are held at once, and the object store has "
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
        if self.features is None:
            return {}
        return {f"features.{field}": paths for field, paths in self.features.files().items()}

    def check(self) -> None:
        """See :class:`Stage`."""
        super().check()
        if self.features is None:
            return
        try:
            self.features.check(self.crops)
        except UserError as error:
            raise UserError(error.what, where=f"features.{error.where}", hint=error.hint) from None

    def run(self, context: Context) -> Mapping[str, float]:
        """Train all students beside one teacher; one that fails does not stop the others."""
        from orchestrator.stages.students import train

        return train(self, context)
