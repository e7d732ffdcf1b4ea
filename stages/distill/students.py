"""The students of a `distill` stage are trained at once, each is published when it is done, and all are gathered."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config.elastic import Elastic
from orchestrator.errors import Stopped, UserError
from orchestrator.fsio import link_or_copy, link_tree
from orchestrator.stages.base import Context
from orchestrator.stages.common.config import stage_seed, summary
from orchestrator.stages.common.mixing import draws_of
from orchestrator.stages.common.weights import StartingWeights, starting_weights
from orchestrator.stages.distill.student_runs import (
    ARTIFACT,
    FIGURES,
    HISTORY,
    StudentRun,
    student_run_of,
    student_runs_of,
)
from orchestrator.storage.artifacts import artifact_in

if TYPE_CHECKING:
    from orchestrator.capacity.rebalance import Balancer
    from orchestrator.stages.distill.config import Distill
    from orchestrator.stages.distill.teacher_kinds import Teaching
    from orchestrator.teacher_service.service import TeacherService
    from orchestrator.tracking.run import Run

# In the stage's own artifact; a checkpoint stays in the student's.
_SHOWN = ("model", "recipe.json", HISTORY, FIGURES, ARTIFACT)


def train(config: Distill, context: Context) -> Mapping[str, float]:
    """Train the students that are not there yet, all at once, and gather all of them."""
    from orchestrator.data.index import pixels_in
    from orchestrator.stages.distill.teacher_kinds import teaching

    identities = {name: config.student_identity(name) for name in config.students}
    config = config.seeing(pixels_in(context.inputs["index"].path))
    seed = stage_seed(context, config.kind)
    order = partial(config.sample_order, batch_size=config.batch_size, seed=seed)
    draws = draws_of(context.name, order, context.inputs["index"].path)
    with ExitStack() as held:
        parts = {
            name: held.enter_context(context.part("student", identity))
            for name, identity in identities.items()
        }
        starts = {
            name: held.enter_context(_start(config, context, name))
            for name, part in parts.items()
            if part.artifact is None and config.students[name].from_ is not None
        }
        teach = teaching(config, context, seed)
        limit = draws.most_unreadable(config.max_unreadable)
        student_runs = student_runs_of(config, context, teach, parts, limit, starts)
        context.work.mkdir(parents=True, exist_ok=True)
        folders = {name: part.artifact for name, part in parts.items() if part.artifact is not None}
        stats, made = _train_all(config, context, teach, student_runs)
    (context.out / "sharing.json").write_text(json.dumps(stats, indent=1))
    metrics = _gather(
        {**folders, **made}, list(config.students), context.out, remote=context.remote is not None
    )
    # What a reader of the summary line wants to see first.
    first = {name: value for name, value in metrics.items() if name.endswith("_last_loss")}
    last_step = _last_step(config, metrics)
    # Of views that come again, each draw counts once: the shares of clusters are the same.
    last_step = min(last_step, config.repeat_after or last_step)
    return first | stats | metrics | draws.write(last_step, context.out)


def _start(config: Distill, context: Context, name: str) -> AbstractContextManager[StartingWeights]:
    """The weights that a student starts from."""
    student = config.students[name]
    # The config takes `from` of models alone.
    assert student.from_ is not None
    assert student.model is not None
    return starting_weights(
        context,
        student.from_,
        student.model,
        student.model_overrides,
        where=f"stages.{context.name}.students.{name}",
        name=name,
    )


def _last_step(config: Distill, metrics: Mapping[str, float]) -> int:
    """The teachers' step at which the last student has ended: what was drawn up to there was drawn for one of them."""
    return max(
        int(metrics.get(f"{name}_first_step", 0.0)) + config.steps_of(student)
        for name, student in config.students.items()
    )


# --- training ---------------------------------------------------------------------------------------------------


def _train_all(
    config: Distill, context: Context, teach: Teaching, student_runs: Mapping[str, StudentRun]
) -> tuple[dict[str, float], dict[str, Path]]:
    """Train all students at once; what the service counted, and the folders of their artifacts."""
    import ray

    from orchestrator.teacher_service.service import TeacherService

    gpus = 0.0 if context.elastic.device == "cpu" else ray.cluster_resources().get("GPU", 0.0)
    config.check_shards(gpus, f"stages.{context.name}.teacher_gpus")
    num_steps = max(
        (student_run.offset + student_run.job.num_steps for student_run in student_runs.values()), default=0
    )
    balance = _balance(config, context, student_runs)
    by_balance = balance is not None and config.teachers == "auto"
    teachers = balance.teachers if balance and by_balance else lambda: config.num_teachers
    window = config.window_of(teachers())
    if student_runs:
        room = ray.cluster_resources().get("object_store_memory", math.inf)
        step_bytes = teach.bytes_per_step([student_run.config for student_run in student_runs.values()])
        config.check_room(window, step_bytes, room, f"stages.{context.name}.window")
    with TeacherService(
        teach.factory([student_run.config for student_run in student_runs.values()], num_steps),
        {
            name: student_run.next_step
            for name, student_run in student_runs.items()
            if not student_run.job.is_done()
        },
        num_steps,
        config.batch_size // config.block_size,
        window=window,
        stall_timeout_s=context.elastic.stall_timeout_s,
        gpus=config.teacher_gpus if gpus else 0.0,
        account=context.work / "sharing.json",
        on_metrics=partial(_track, context.run),
        teachers=teachers,
        shards=config.teacher_shards,
        needs=[_need(student_run.job.elastic) for student_run in student_runs.values()],
    ) as service:
        made = _in_threads(context, teach, service, balance, student_runs)
    return asdict(service.account.stats()), made


def _need(elastic: Elastic) -> tuple[int, float]:
    """The minimum of workers that a student begins with, and the CPUs that each reserves where it runs on them."""
    return elastic.workers[0], elastic.resources.cpu or 1.0


def _balance(config: Distill, context: Context, student_runs: Mapping[str, StudentRun]) -> Balancer | None:
    """Who may have how many workers, where that is to follow from measured costs."""
    from orchestrator.stages.common.config import ModelRecipe
    from orchestrator.stages.distill.balancing import balancer
    from orchestrator.stages.distill.profiling import Material

    if config.workers is None or not student_runs:
        return None
    index, teacher = context.inputs["index"], context.inputs.get("teacher")
    recipe = None
    if teacher is not None:
        recipe = ModelRecipe.model_validate_json((teacher.path / "recipe.json").read_text())
    folder = teacher.path if teacher is not None else None
    material = Material(
        config, recipe, folder, index.path, index.key, context.elastic.device, context.sources
    )
    left = {
        name: student_run.job.num_steps - (student_run.next_step - student_run.offset)
        for name, student_run in student_runs.items()
    }
    bounds = {
        name: _bounds(student_run.job.elastic)
        for name, student_run in student_runs.items()
        if student_run.config.workers is not None
    }
    return balancer(material, left, bounds)


def _bounds(elastic: Elastic) -> tuple[int, int | None]:
    return elastic.workers[0], None if elastic.every_device else elastic.workers[1]


def _in_threads(
    context: Context,
    teach: Teaching,
    service: TeacherService,
    balance: Balancer | None,
    student_runs: Mapping[str, StudentRun],
) -> dict[str, Path]:
    if not student_runs:
        return {}
    with ThreadPoolExecutor(len(student_runs), thread_name_prefix="student") as pool:
        futures = {
            name: pool.submit(_train_one, context, teach, service, balance, student_run)
            for name, student_run in student_runs.items()
        }
    _raise_first(futures)
    return {name: future.result() for name, future in futures.items()}


def _train_one(
    context: Context,
    teach: Teaching,
    service: TeacherService,
    balance: Balancer | None,
    student_run: StudentRun,
) -> Path:
    """Train one student to its end and publish it at once; whatever becomes of the other students."""
    from orchestrator.elastic import trainer

    run = student_run_of(context, student_run.name)
    run.params(student_run.config.model_dump(mode="json"))
    source = service.source(
        student_run.name,
        teach.parts_of(student_run.config),
        teach.own_views(student_run.config),
        student_run.offset,
    )
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    try:
        limit = balance.quota(student_run.name) if balance is not None else None
        job = replace(student_run.job, slot_blocks=source, limit=limit)
        account = trainer.run(job, tracker=run, stop=context.stop)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        service.deregister(student_run.name)
        if balance is not None:
            balance.deregister(student_run.name)
        run.finish(status)
    return _publish(student_run, run, account, context.out)


def _publish(student_run: StudentRun, run: Run, account: Mapping[str, float], near: Path) -> Path:
    """The student as an artifact: weights, recipe, checkpoint and history."""
    folder = near.with_name(f"{near.name}-{student_run.name}")
    folder.mkdir()
    student_run.job.collect_finished(folder)
    student_run.job.collect(folder / "checkpoint")
    history = run.history()
    (folder / HISTORY).write_text(json.dumps(history))
    last_loss = summary(history).get("last_loss", float("nan"))
    metrics = {"last_loss": last_loss, "first_step": float(student_run.offset), **account}
    (folder / FIGURES).write_text(json.dumps(metrics))
    (folder / ARTIFACT).write_text(json.dumps({"kind": "student", "key": student_run.part.key}))
    made = student_run.part.publish(folder, metrics)
    shutil.rmtree(folder, ignore_errors=True)
    return made


def _gather(
    folders: Mapping[str, Path], names: Sequence[str], out: Path, *, remote: bool = False
) -> dict[str, float]:
    """All students in the stage's own artifact, and their metrics; of artifacts in a `remote` store by reference."""
    metrics: dict[str, float] = {}
    for name in names:
        _show(folders[name], out / "students" / name, remote=remote)
        own = json.loads((folders[name] / FIGURES).read_text())
        metrics |= {f"{name}_{figure}": value for figure, value in own.items()}
    metrics["goodput"] = min(metrics[f"{name}_goodput"] for name in names)
    return metrics


def _show(folder: Path, target: Path, *, remote: bool) -> None:
    """Make what is shown of a student, whose artifact has this folder, part of the stage's own."""
    target.mkdir(parents=True)
    artifact = artifact_in(folder, remote=remote)
    for entry in _SHOWN:
        source = folder / entry
        if artifact is not None and entry in artifact.manifest.files:
            # Of a student's files the store knows the sha256: they are not read for it again.
            artifact.link(entry, target / entry)
        elif artifact is not None:
            artifact.link_folder(source, target / entry)
        elif source.is_dir():
            link_tree(source, target / entry)
        else:
            link_or_copy(source, target / entry)


def _track(run: Run, metrics: Mapping[str, float]) -> None:
    # By images forwarded: the one counter that moves whenever another does.
    if metrics["images_forwarded"]:
        run.metrics(dict(metrics), int(metrics["images_forwarded"]), channel="sharing")


def _raise_first(futures: Mapping[str, Future[Any]]) -> None:
    """Raise what went wrong, after all have ended: a stop before a failure, a failure with all names.

    Mistakes alone are a mistake: the same one if all found the same.
    """
    errors = {name: error for name, future in futures.items() if (error := future.exception()) is not None}
    if not errors:
        return
    for error in errors.values():
        if isinstance(error, Stopped):
            raise error
    first = next(iter(errors.values()))
    mistakes = [error for error in errors.values() if isinstance(error, UserError)]
    all_mistakes = len(mistakes) == len(errors)
    if len(futures) == 1 or (all_mistakes and len({error.what for error in mistakes}) == 1):
        raise first
    done = [name for name in futures if name not in errors]
    kept = f"; {', '.join(done)} finished and {'is' if len(done) == 1 else 'are'} kept" if done else ""
    failed = "; ".join(
        f"{name}: {error.what if isinstance(error, UserError) else error}" for name, error in errors.items()
    )
    if all_mistakes:
        where, hint = (_common([getattr(error, field) for error in mistakes]) for field in ("where", "hint"))
        raise UserError(f"{failed}{kept}", where=where, hint=hint) from first
    raise RuntimeError(f"{failed}{kept}") from first


def _common(texts: Sequence[str | None]) -> str | None:
    """What all say, or None."""
    return texts[0] if len(set(texts)) == 1 else None
