"""A whole self-supervised stage, or one student, in a worker without Ray: the real loop instead of Ray Train."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.data.index import pixels_in
from orchestrator.elastic import trainer
from orchestrator.errors import UserError
from orchestrator.stages import AnyStage
from orchestrator.stages.base import Context
from orchestrator.stages.common.config import stage_seed
from orchestrator.stages.distill import students
from orchestrator.stages.distill.student_runs import student_run_of, student_runs_of
from orchestrator.stages.distill.teacher_kinds import teaching
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun
from orchestrator.training import loop
from orchestrator.training.job import Job

# As in lab.py.
if __package__:
    from .worker import TaughtBlocks
else:
    from worker import TaughtBlocks


class _Reports:
    """A controller that only takes metrics."""

    def __init__(self, run: NullRun) -> None:
        self._run = run

    def phase(self, name: str) -> None: ...

    def report(
        self, step: int, metrics: Mapping[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        assert self._run.metrics(metrics, step), "a step was recorded twice"
        if held_out:
            self.looked(step, held_out)

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        assert self._run.metrics(held_out, step, "val"), "a look was recorded twice"

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def trouble(self, what: str) -> None:
        raise AssertionError(what)

    def stop_requested(self) -> bool:
        return False


def train(job: Job, *, tracker: Any, stop: Any) -> dict[str, float]:
    """In the place of `trainer.run`: the loop itself, in this process."""
    assert loop.train(job, _Reports(tracker))
    return {}


def stage(spec: dict[str, Any]) -> Any:
    """Run `config`; what it says if it is a mistake, else its history.

    The artifact is `folder`/out. `inputs` are folders of artifacts by role, `shorter` is that of a shorter run.
    """
    config, context = _prepared(spec)
    try:
        config.run(context)
    except UserError as error:
        return {"error": str(error), "history": context.run.history(), "held_out": context.run.history("val")}
    return {"history": context.run.history(), "held_out": context.run.history("val")}


def student(spec: dict[str, Any]) -> Any:
    """Train the one student of a distillation as its stage would, but for the teacher service; its history.

    The stage's artifact is `folder`/out, and its student's the folder that is returned.
    """
    config, context = _prepared(spec)
    config = config.seeing(pixels_in(context.inputs["index"].path))
    teach = teaching(config, context, stage_seed(context, config.kind))
    (name,) = config.students
    with context.part("student", config.student_identity(name)) as part:
        (run,) = student_runs_of(config, context, teach, {name: part}).values()
        teacher = teach.factory([run.config], run.job.num_steps)
        blocks = partial(TaughtBlocks, teacher(), run.job.num_blocks)
        tracker = student_run_of(context, name)
        begun = run.next_step
        train(replace(run.job, blocks=blocks), tracker=tracker, stop=context.stop)
        made = students._publish(run, tracker, {}, context.out)
    (context.out / "students" / name).mkdir(parents=True)
    shutil.copy(made / "artifact.json", context.out / "students" / name)
    return {"history": tracker.history(), "made": str(made), "begun": begun}


class _Runs(NullRun):
    """Children are the same ones each time."""

    def __init__(self) -> None:
        super().__init__()
        self._children: dict[str | None, NullRun] = {}

    def child(self, name: str, resume_id: str | None = None) -> NullRun:
        return self._children.setdefault(resume_id, NullRun())


def _prepared(spec: dict[str, Any]) -> tuple[Any, Context]:
    trainer.run = train  # type: ignore[assignment]
    folder = Path(spec["folder"])
    (folder / "out").mkdir(parents=True)
    (folder / "work").mkdir()
    config: Any = TypeAdapter(AnyStage).validate_python(spec["config"])
    context = Context(
        name="stage",
        pipeline="test",
        seed=0,
        key="0" * 64,
        inputs={role: artifact(role, Path(path)) for role, path in spec["inputs"].items()},
        keys={},
        sources={name: DataSource.model_validate(one) for name, one in spec.get("sources", {}).items()},
        out=folder / "out",
        work=folder / "work",
        elastic=Elastic(checkpoint_every_s=1e9, device="cpu", exact=spec.get("exact", False)),
        run=_Runs(),
        shorter=artifact("stage", Path(spec["shorter"])) if spec.get("shorter") else None,
        find=lambda kind, key: Path(spec["found"]),
    )
    return config, context


def artifact(kind: str, path: Path) -> Artifact:
    """What a folder would be as another stage's result."""
    made_by = {"made_by": {"dinov3-orchestrator": "0.1.0", "python": "3.11"}}
    manifest = Manifest(kind=kind, key="1" * 64, created="", files={}, provenance=made_by, summary={})
    return Artifact("1" * 64, kind, path, manifest)
