"""`distill`: one frozen teacher, any number of students, each its own elastic job."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.data.crops import CropConfig
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
    from orchestrator.elastic.loop import Job
    from orchestrator.tracking.runs import Run

logger = logging.getLogger("orchestrator")


class Student(Strict):
    """One student. Its heads have the teacher's prototypes and the sizes of the teacher's heads."""

    model: ModelName
    drop_path: float = Field(0.0, ge=0, lt=1)
    optimizer: Optimizer | None = Field(None, description="default: the stage's")
    mask_inputs: bool = Field(True, description="students see masked crops (paper); false: published code")
    zero_stage: Literal[1, 2, 3] = operational(3)
    workers: int | tuple[int, int] | None = operational(None, description="overrides `elastic.workers`")


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
    window: int = operational(4, ge=2, description="teacher steps held for the slowest student")

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

    def run(self, context: Context) -> Mapping[str, float]:
        """Train all students beside one teacher; one that fails does not stop the others."""
        import ray

        from orchestrator.sharing.service import ShareActor
        from orchestrator.stages.tasks.distill import FrozenTeacher

        teacher_folder = context.inputs["teacher"].path
        recipe = ModelRecipe.model_validate_json((teacher_folder / "recipe.json").read_text())
        seed = stage_seed(context, self.kind)
        actor = (
            ray.remote(ShareActor)
            .options(num_cpus=1, max_concurrency=8 * len(self.students) + 4, runtime_env=_teacher_env())
            .remote(
                partial(FrozenTeacher, self, recipe, teacher_folder, context.inputs["index"].path, seed),
                self._first_steps(context, recipe),
                self.steps,
                self.window,
            )
        )
        jobs = {name: self._job(context, name, recipe, actor) for name in self.students}
        jobs = _sharing_gpus(jobs, ray.cluster_resources().get("GPU", 0))
        watch = _StatsWatch(actor, context)
        try:
            runs = self._train_all(jobs, actor, context)
        finally:
            stats = watch.finish()
            ray.kill(actor)
        (context.out / "sharing.json").write_text(json.dumps(stats, indent=1))
        return self._collect(jobs, runs, recipe, context) | stats

    def _first_steps(self, context: Context, recipe: ModelRecipe) -> dict[str, int]:
        """The students still to train, and the step each goes on from."""
        from orchestrator.elastic import checkpoint
        from orchestrator.elastic import job as elastic

        first = {}
        for name in self.students:
            job = self._job(context, name, recipe, None)
            if not elastic.is_done(job):
                saved = checkpoint.latest(job.checkpoints)
                first[name] = saved.step if saved else 0
        return first

    def _train_all(self, jobs: Mapping[str, Job], actor: Any, context: Context) -> dict[str, Run]:
        import ray

        from orchestrator.elastic import job as elastic

        def train(name: str) -> Run:
            # The id follows from the stage's, so a resumed stage finds its students' runs again.
            run = context.run.child(f"{context.name}/{name}", resume_id=f"{context.run.run_id}-{name}")
            run.params(self.students[name].model_dump(mode="json"))
            status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
            try:
                elastic.run(jobs[name], tracker=run, stop=context.stop)
                status = "FINISHED"
            except Stopped:
                status = "KILLED"
                raise
            finally:
                ray.get(actor.leave.remote(name))
                run.finish(status)
            return run

        with ThreadPoolExecutor(len(jobs), thread_name_prefix="student") as pool:
            futures = {name: pool.submit(train, name) for name in jobs}
        _raise_first(futures)
        return {name: future.result() for name, future in futures.items()}

    def _job(self, context: Context, name: str, recipe: ModelRecipe, actor: Any) -> Job:
        from orchestrator.data.rng import derive
        from orchestrator.elastic.loop import Job
        from orchestrator.sharing.client import SharedBlocks
        from orchestrator.stages.tasks.distill import DistillTask

        student = self.students[name]
        elastic = context.elastic
        if student.workers is not None:
            elastic = elastic.model_validate({**elastic.model_dump(), "workers": student.workers})
        seed = derive(stage_seed(context, self.kind), name)
        return Job(
            name=f"{context.name}/{name}",
            task=partial(DistillTask, self, student, recipe, context.inputs["teacher"].path, seed),
            blocks=partial(SharedBlocks, actor, name, self.batch_size // self.block_size),
            num_steps=self.steps,
            optimizer=student.optimizer or self.optimizer,
            zero_stage=student.zero_stage,
            precision=self.precision,
            work=context.work / "students" / name,
            seed=seed % 2**31,
            elastic=elastic,
        )

    def _collect(
        self, jobs: Mapping[str, Job], runs: Mapping[str, Run], recipe: ModelRecipe, context: Context
    ) -> dict[str, float]:
        from orchestrator.elastic import job as elastic
        from orchestrator.stages.tasks.ssl import save_backbone

        figures: dict[str, float] = {}
        for name, job in jobs.items():
            student, folder = self.students[name], context.out / "students" / name
            own = recipe.model_copy(update={"model": student.model, "drop_path": student.drop_path})
            folder.mkdir(parents=True)
            save_backbone(job.export(job.num_steps), own, folder / "model", self.crops.global_size)
            shutil.copytree(elastic.final_checkpoint(job), folder / "checkpoint")
            (folder / "recipe.json").write_text(own.model_dump_json(indent=1))
            history = runs[name].history()
            (folder / "history.json").write_text(json.dumps(history))
            figures[f"{name}_last_loss"] = summary(history).get("last_loss", float("nan"))
        return figures


def _sharing_gpus(jobs: dict[str, Job], gpus: float) -> dict[str, Job]:
    """The jobs, on shares of GPUs where there are fewer GPUs than students' workers.

    All students must run at once: one that waits for a GPU would hold up the others, which wait for it within
    the window. Worker counts are then fixed at the fewest, since Ray Train resizes whole GPUs only.
    """
    workers = sum(job.elastic.workers[0] for job in jobs.values())
    if not gpus or gpus >= workers:
        return jobs
    share = int(100 * gpus / workers) / 100
    return {
        name: replace(
            job,
            gpus_per_worker=share,
            elastic=job.elastic.model_copy(update={"workers": (job.elastic.workers[0],) * 2}),
        )
        for name, job in jobs.items()
    }


class _StatsWatch:
    """Logs the share service's counters every few seconds, and once more at the end."""

    def __init__(self, actor: Any, context: Context, every_s: float = 5.0) -> None:
        self._actor, self._context, self._every_s = actor, context, every_s
        self._ended = threading.Event()
        self._stats: dict[str, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, float]:
        self._ended.set()
        self._thread.join()
        return self._stats

    def _watch(self) -> None:
        import ray

        while True:
            ended = self._ended.wait(self._every_s)
            try:
                stats = ray.get(self._actor.stats.remote(), timeout=10)
            except (ray.exceptions.RayError, TimeoutError) as error:
                logger.warning("the share service does not answer: %s", error)
            else:
                self._stats = {
                    **asdict(stats),
                    "teacher_forwards_per_image": stats.teacher_forwards_per_image,
                }
                if stats.images_needed:
                    self._context.run.metrics(self._stats, stats.images_needed, channel="sharing")
            if ended:
                return


def _teacher_env() -> dict[str, Any]:
    return {"env_vars": {"OMP_NUM_THREADS": "1"}}


def _raise_first(futures: Mapping[str, Future[Run]]) -> None:
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
