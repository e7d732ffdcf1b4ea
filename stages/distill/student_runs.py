"""Which students of a `distill` stage are still to train: their jobs, their share of GPUs, the step they begin at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from orchestrator.stages.base import Context, Part
from orchestrator.stages.common.config import stage_seed

if TYPE_CHECKING:
    from orchestrator.stages.common.weights import StartingWeights
    from orchestrator.stages.distill.config import Distill
    from orchestrator.stages.distill.student_config import Student
    from orchestrator.stages.distill.teacher_kinds import Teaching
    from orchestrator.tracking.run import Run
    from orchestrator.training.job import Job

_STUDENT = "student.json"
# In a student's artifact.
HISTORY, FIGURES, ARTIFACT = "history.json", "figures.json", "artifact.json"


@dataclass(frozen=True)
class StudentRun:
    """One student: its artifact-to-be, its job, and the teachers' step at its own step 0."""

    name: str
    config: Student
    part: Part
    job: Job
    offset: int

    @property
    def next_step(self) -> int:
        """The teachers' step that it needs next."""
        return self.offset + max(self.job.checkpoint_storage.committed(), default=0)


def student_runs_of(
    config: Distill,
    context: Context,
    teach: Teaching,
    parts: Mapping[str, Part],
    max_unreadable: int | None = None,
    starts: Mapping[str, StartingWeights] | None = None,
) -> dict[str, StudentRun]:
    import ray

    gpus = 0.0 if context.elastic.device == "cpu" else ray.cluster_resources().get("GPU", 0.0)
    missing = [name for name, part in parts.items() if part.artifact is None]
    shorter = {name: folder for name in missing if (folder := _shorter(config, context, name)) is not None}
    jobs = {
        name: student_job(config, context, teach, name, parts[name], max_unreadable, (starts or {}).get(name))
        for name in missing
    }
    for name, folder in shorter.items():
        figures = json.loads((folder / FIGURES).read_text())
        _offset(parts[name], jobs[name].name, int(figures.get("first_step", 0)))
        _continue_from(folder, jobs[name], student_run_of(context, name))
    jobs = sharing_gpus(jobs, gpus, config.num_teachers, config.teacher_gpus * config.teacher_shards)
    front = _front(config, jobs, parts)
    return {
        name: StudentRun(
            name,
            config.students[name],
            parts[name],
            jobs[name],
            _offset(parts[name], jobs[name].name, front if config.students[name].joins == "now" else 0),
        )
        for name in missing
    }


def student_run_of(context: Context, name: str) -> Run:
    """The run of a student. Its id follows from the stage's, so a resumed stage finds its students' runs again."""
    return context.run.child(f"{context.name}/{name}", resume_id=f"{context.run.run_id}-{name}")


def _shorter(config: Distill, context: Context, name: str) -> Path | None:
    """The artifact of this very student with fewer steps, from which it goes on; None if it starts over."""
    if context.shorter is None or config.student_tied_to_steps(name):
        return None
    pointer = context.shorter.path / "students" / name / ARTIFACT
    if not pointer.is_file():
        return None
    made = json.loads(pointer.read_text())
    return context.find(str(made["kind"]), str(made["key"]))


def _continue_from(shorter: Path, job: Job, run: Run) -> None:
    """Go on from a shorter run of a student: its figures and its checkpoint."""
    for record in json.loads((shorter / HISTORY).read_text()):
        run.metrics(record["metrics"], record["step"])
    job.adopt(shorter / "checkpoint", {})


def student_job(
    config: Distill,
    context: Context,
    teach: Teaching,
    name: str,
    part: Part,
    max_unreadable: int | None = None,
    start: StartingWeights | None = None,
) -> Job:
    """A student's job, but for its blocks, which need the teacher service.

    So many photos may become unreadable, or any number. Its backbone starts from `start`, or from random weights.
    """
    from orchestrator.data.rng import derive
    from orchestrator.training.job import Job

    student = config.students[name]
    elastic = context.elastic
    resources = elastic.resources.overlaid(student.resources)
    elastic = elastic.model_copy(
        update={"workers": student.workers or elastic.workers, "resources": resources}
    )
    seed = derive(stage_seed(context, config.kind), name)
    return Job(
        name=f"{context.name}/{name}",
        task=teach.task(name, seed, start.file if start else None),
        num_blocks=config.batch_size // config.block_size,
        num_steps=config.steps_of(student),
        optimizer=student.optimizer or config.optimizer,
        zero_stage=student.zero_stage,
        precision=student.precision or config.precision,
        work=part.work,
        seed=seed % 2**31,
        elastic=elastic,
        remote=part.remote,
        inputs=context.needed + (start.needed if start else ()),
        pipeline=context.pipeline,
        max_unreadable=max_unreadable,
        finish=teach.finish(name),
    )


def sharing_gpus(jobs: dict[str, Job], gpus: float, teachers: int, each: float) -> dict[str, Job]:
    """The jobs, on shares of GPUs where there are too few for all students' workers and `teachers` of `each`.

    All students should run at once: one that waits for a GPU holds up the others, which wait for it within the
    window. Each GPU is cut into equal places, as a share cannot span two, and worker counts are fixed at
    min_workers, since one worker more would only take from the others. A student whose `resources.gpu` is set
    gets that. A student with several workers gets whole GPUs: two workers of one group cannot be on one GPU.

    Raises:
        UserError: the teachers, and students that cannot share, leave nothing for the others.
    """
    taken = {name: job.elastic.workers[0] * (job.resources.gpu or 1.0) for name, job in jobs.items()}
    if not gpus or not jobs or gpus >= sum(taken.values()) + math.ceil(teachers * each):
        return jobs
    # Teachers of whole GPUs have them to themselves; smaller ones sit beside the students, spread over all.
    whole = teachers * each if each >= 1 else 0
    beside = 0 if each >= 1 else math.ceil(teachers / gpus) * each
    stage = f"stages.{next(iter(jobs.values())).name.partition('/')[0]}"
    if gpus - whole < 1 or beside >= 0.95:
        raise UserError(
            f"{teachers} teachers of {each:g} GPUs each leave none of {gpus:g} GPUs for students",
            where=f"{stage}.teacher_gpus",
            hint="give fewer teachers, or less of a GPU to each",
        )
    cut = [name for name, job in jobs.items() if job.resources.gpu is None and job.elastic.workers[0] == 1]
    room = math.floor(gpus - whole - sum(taken[name] for name in jobs if name not in cut))
    if room < 1 if cut else room < 0:
        others = ", ".join(name for name in jobs if name not in cut)
        raise UserError(
            f"students that need GPUs of their own ({others}) leave too few of {gpus:g} GPUs",
            where=f"{stage}.students",
            hint="set their workers to 1 so that they can share, or their resources.gpu to a smaller share",
        )
    places = math.ceil(len(cut) / room) if cut else 1
    share = int(100 * (1 - beside) / places) / 100
    single = int(100 * (1 - beside)) / 100
    return {name: _on_gpus(job, share if name in cut else single) for name, job in jobs.items()}


def _on_gpus(job: Job, share: float) -> Job:
    """The job at min_workers, on this share of a GPU for each if it does not say itself."""
    min_workers = job.elastic.workers[0]
    resources = job.resources
    if resources.gpu is None:
        resources = resources.model_copy(update={"gpu": share})
    update = {"workers": (min_workers, min_workers), "resources": resources}
    return replace(job, elastic=job.elastic.model_copy(update=update))


def _front(config: Distill, jobs: Mapping[str, Job], parts: Mapping[str, Part]) -> int:
    """Where the others are: the slowest that still trains, or else the end of the last one."""
    at = {name: max(job.checkpoint_storage.committed(), default=0) for name, job in jobs.items()}
    under_way = [step for name, step in at.items() if config.students[name].joins == "start"]
    done = [
        config.steps_of(config.students[name]) for name, part in parts.items() if part.artifact is not None
    ]
    return min(under_way) if under_way else max(done, default=0)


def _offset(part: Part, job: str, front: int) -> int:
    """The teachers' step at which a student begins: decided once, and kept beside its checkpoints."""
    known = _known(part)
    if known is not None:
        return int(known["first_step"])
    text = json.dumps({"job": job, "first_step": front})
    part.work.mkdir(parents=True, exist_ok=True)
    (part.work / _STUDENT).write_text(text)
    if part.remote is not None:
        store, prefix = part.remote
        store.put_bytes(f"{prefix}{_STUDENT}", text.encode())
    return front


def _known(part: Part) -> dict[str, Any] | None:
    try:
        if part.remote is not None:
            store, prefix = part.remote
            text = store.get_bytes(f"{prefix}{_STUDENT}").decode()
        else:
            text = (part.work / _STUDENT).read_text()
        known: Any = json.loads(text)
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return known if isinstance(known, dict) and isinstance(known.get("first_step"), int) else None
