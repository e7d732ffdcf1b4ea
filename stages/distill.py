"""`distill`: one frozen teacher, any number of students, each its own elastic job."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.data.views import CropConfig
from orchestrator.errors import Stopped
from orchestrator.spec import Optimizer, Schedule, Strict, operational
from orchestrator.stages.base import Context, Input, TrainStage
from orchestrator.stages.selfsup import (
    BACKBONE_KINDS,
    INDEX_KINDS,
    ModelName,
    ModelRecipe,
    check_crops,
    stage_seed,
    summary,
)

if TYPE_CHECKING:
    from orchestrator.elastic.job import Job
    from orchestrator.sharing.account import Stats
    from orchestrator.sharing.keeper import Keeper
    from orchestrator.sharing.service import StepTeacher
    from orchestrator.tracking.runs import Run

# What the teacher takes of a GPU that it may share with workers.
_TEACHER_GPU = 0.1


class Student(Strict):
    """One student. Its heads have the teacher's prototypes and the sizes of the teacher's heads."""

    model: ModelName
    drop_path: float = Field(0.0, ge=0, lt=1)
    optimizer: Optimizer | None = Field(None, description="default: the stage's")
    mask_inputs: bool = Field(True, description="students see masked crops (paper); false: published code")
    zero_stage: Literal[1, 2, 3] = operational(3)
    workers: int | tuple[int, int] | None = operational(None, description="overrides `elastic.workers`")


@dataclass(frozen=True)
class Trained:
    """A student's run, and the account of its job."""

    run: Run
    account: dict[str, float]


class Distill(TrainStage):
    """Multi-student distillation (arXiv 2508.10104, section 5.2): the pretraining losses with the frozen teacher in
    the place of the EMA; its forward is computed once a step for all students.
    """

    kind: Literal["distill"]
    students: dict[str, Student] = Field(min_length=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1, description="images a step, the same for all students")
    block_size: int = Field(16, ge=2)
    crops: CropConfig = CropConfig()
    optimizer: Optimizer
    ema: Schedule = Schedule(peak=0.994, end=1.0, shape="cosine")
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.07, gt=0)
    local_weight: float = Field(1.0, ge=0)
    ibot_weight: float = Field(1.0, ge=0)
    koleo_weight: float = Field(0.1, ge=0)
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_probability: float = Field(0.5, ge=0, le=1)
    homogeneous: str | None = None
    homogeneous_ratio: float = Field(0.1, ge=0, le=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    chunk_rows: int | None = operational(
        None, ge=1, description="rows whose logits are held at once; null: of all rows of a block"
    )
    window: int = operational(4, ge=2, description="teacher steps held for the slowest student")

    preload: ClassVar[tuple[str, ...]] = ("orchestrator.stages.tasks.distill",)
    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS), Input("teacher", BACKBONE_KINDS))
    outputs: ClassVar[Mapping[str, str]] = {
        "students": "a folder a student: model/ (EMA), recipe.json, checkpoint/, history.json",
        "sharing.json": "what the teacher computed and handed out",
    }

    @model_validator(mode="after")
    def _fits(self) -> Distill:
        if self.batch_size % self.block_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of block_size {self.block_size}"
            )
        for student in self.students.values():
            check_crops(self.crops, student.model)
        return self

    def crops_at(self, step: int, seed: int) -> CropConfig:
        """The views of `step`: the same in all."""
        return self.crops

    def run(self, context: Context) -> Mapping[str, float]:
        """Train all students beside one teacher; one that fails does not stop the others."""
        import ray

        from orchestrator.sharing.keeper import Keeper
        from orchestrator.stages.tasks.distill import FrozenTeacher

        folder = context.inputs["teacher"].path
        recipe = ModelRecipe.model_validate_json((folder / "recipe.json").read_text())
        seed = stage_seed(context, self.kind)
        gpus = 0.0 if context.elastic.device == "cpu" else ray.cluster_resources().get("GPU", 0.0)
        jobs = _sharing_gpus({name: self._job(context, name, recipe) for name in self.students}, gpus)
        first_steps = {
            name: max(job.target.committed(), default=0) for name, job in jobs.items() if not job.is_done()
        }
        context.work.mkdir(parents=True, exist_ok=True)
        teacher = partial(FrozenTeacher, self, recipe, folder, context.inputs["index"].path, seed)
        with Keeper(
            partial(_with_inputs, context.needed, teacher),
            first_steps,
            self.steps,
            window=self.window,
            hang_s=context.elastic.hang_s,
            gpus=_TEACHER_GPU if gpus else 0.0,
            account=context.work / "sharing.json",
            on_figures=partial(_track, context.run),
        ) as keeper:
            trained = self._train_all(jobs, keeper, context)
        stats = asdict(keeper.account.stats())
        (context.out / "sharing.json").write_text(json.dumps(stats, indent=1))
        return self._collect(jobs, trained, recipe, context) | stats

    def _train_all(self, jobs: Mapping[str, Job], keeper: Keeper, context: Context) -> dict[str, Trained]:
        from orchestrator.elastic import controller

        def train(name: str) -> Trained:
            # The id follows from the stage's, so a resumed stage finds its students' runs again.
            run = context.run.child(f"{context.name}/{name}", resume_id=f"{context.run.run_id}-{name}")
            run.params(self.students[name].model_dump(mode="json"))
            job = replace(jobs[name], seat_blocks=keeper.source(name, jobs[name].num_blocks))
            status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
            try:
                account = controller.run(job, tracker=run, stop=context.stop)
                status = "FINISHED"
            except Stopped:
                status = "KILLED"
                raise
            finally:
                keeper.leave(name)
                run.finish(status)
            return Trained(run, account)

        with ThreadPoolExecutor(len(jobs), thread_name_prefix="student") as pool:
            futures = {name: pool.submit(train, name) for name in jobs}
        _raise_first(futures)
        return {name: future.result() for name, future in futures.items()}

    def _job(self, context: Context, name: str, recipe: ModelRecipe) -> Job:
        """A student's job, but for its blocks, which need the share service."""
        from orchestrator.data.rng import derive
        from orchestrator.elastic.job import Job
        from orchestrator.stages.tasks.distill import DistillTask

        student = self.students[name]
        elastic = context.elastic
        if student.workers is not None:
            elastic = elastic.model_validate({**elastic.model_dump(), "workers": student.workers})
        seed = derive(stage_seed(context, self.kind), name)
        return Job(
            name=f"{context.name}/{name}",
            task=partial(DistillTask, self, student, recipe, context.inputs["teacher"].path, seed),
            num_blocks=self.batch_size // self.block_size,
            num_steps=self.steps,
            optimizer=student.optimizer or self.optimizer,
            zero_stage=student.zero_stage,
            precision=self.precision,
            work=context.work / "students" / name,
            seed=seed % 2**31,
            elastic=elastic,
            remote=(context.remote[0], f"{context.remote[1]}students/{name}/") if context.remote else None,
            inputs=context.needed,
        )

    def _collect(
        self, jobs: Mapping[str, Job], trained: Mapping[str, Trained], recipe: ModelRecipe, context: Context
    ) -> dict[str, float]:
        from orchestrator.stages.tasks.backbone import save_backbone

        figures: dict[str, float] = {}
        for name, job in jobs.items():
            student, folder = self.students[name], context.out / "students" / name
            own = recipe.model_copy(update={"model": student.model, "drop_path": student.drop_path})
            folder.mkdir(parents=True)
            save_backbone(job.export(job.num_steps), own, folder / "model", self.crops.global_size)
            job.collect(folder / "checkpoint")
            (folder / "recipe.json").write_text(own.model_dump_json(indent=1))
            history = trained[name].run.history()
            (folder / "history.json").write_text(json.dumps(history))
            figures[f"{name}_last_loss"] = summary(history).get("last_loss", float("nan"))
            figures |= {f"{name}_{figure}": value for figure, value in trained[name].account.items()}
        figures["goodput"] = min(figures[f"{name}_goodput"] for name in jobs)
        return figures


def _sharing_gpus(jobs: dict[str, Job], gpus: float) -> dict[str, Job]:
    """The jobs, on shares of GPUs where there are no more GPUs than students' workers; the teacher needs some, too.

    All students should run at once: one that waits for a GPU holds up the others, which wait for it within the
    window. Each GPU is cut into equal places, as a share cannot span two, and worker counts are fixed at the
    fewest, since a worker more would only take from the others.
    """
    workers = sum(job.elastic.workers[0] for job in jobs.values())
    if not gpus or gpus > workers:
        return jobs
    share = int(100 * (1 - _TEACHER_GPU) / -(-workers // gpus)) / 100
    return {
        name: replace(
            job,
            gpus_per_worker=share,
            elastic=job.elastic.model_copy(update={"workers": (job.elastic.workers[0],) * 2}),
        )
        for name, job in jobs.items()
    }


def _track(run: Run, stats: Stats) -> None:
    # By images forwarded: the one counter that moves whenever another does.
    if stats.images_forwarded:
        run.metrics(asdict(stats), stats.images_forwarded, channel="sharing")


def _raise_first(futures: Mapping[str, Future[Trained]]) -> None:
    """Raise what went wrong, after all have ended: a stop before a failure, a failure with all names."""
    errors = {name: error for name, future in futures.items() if (error := future.exception()) is not None}
    if not errors:
        return
    for error in errors.values():
        if isinstance(error, Stopped):
            raise error
    first = next(iter(errors.values()))
    if len(errors) == 1:
        raise first
    raise RuntimeError("; ".join(f"{name}: {error}" for name, error in errors.items())) from first


def _with_inputs(needed: Sequence[tuple[str, str, str]], make: Callable[[], StepTeacher]) -> StepTeacher:
    """The teacher, on a machine that may not have its artifacts yet."""
    from orchestrator.store.open import fetch

    for store, kind, key in needed:
        fetch(store, kind, key)
    return make()
