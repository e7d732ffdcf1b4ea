"""A whole self-supervised stage in a worker without Ray: its own `run`, with the real loop instead of Ray Train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.config.elastic import Elastic
from orchestrator.elastic import trainer
from orchestrator.errors import UserError
from orchestrator.stages import AnyStage
from orchestrator.stages.base import Context
from orchestrator.storage.artifacts import Artifact, Manifest
from orchestrator.tracking.run import NullRun
from orchestrator.training import loop
from orchestrator.training.job import Job


class _Reports:
    """A controller that only takes figures."""

    def __init__(self, run: NullRun) -> None:
        self._run = run

    def phase(self, name: str) -> None: ...

    def report(
        self, step: int, figures: Mapping[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        assert self._run.metrics(figures, step), "a step was recorded twice"

    def recorded(self, step: int) -> bool:
        return True

    def saved(self, step: int, figures: Mapping[str, float]) -> None: ...

    def trouble(self, what: str) -> None:
        raise AssertionError(what)

    def stop_requested(self) -> bool:
        return False


def _train(job: Job, *, tracker: Any, stop: Any) -> dict[str, float]:
    assert loop.train(job, _Reports(tracker))
    return {}


def stage(spec: dict[str, Any]) -> Any:
    """Run `config`; what it says if it is a mistake, else its history.

    The artifact is `folder`/out. `inputs` are folders of artifacts by role, `shorter` is that of a shorter run.
    """
    trainer.run = _train  # type: ignore[assignment]
    folder = Path(spec["folder"])
    (folder / "out").mkdir(parents=True)
    (folder / "work").mkdir()
    config: Any = TypeAdapter(AnyStage).validate_python(spec["config"])
    context = Context(
        name="stage",
        pipeline="test",
        seed=0,
        key="0" * 64,
        inputs={role: _artifact(role, Path(path)) for role, path in spec["inputs"].items()},
        keys={},
        sources={},
        out=folder / "out",
        work=folder / "work",
        elastic=Elastic(checkpoint_every_s=1e9, device="cpu", exact=spec.get("exact", False)),
        run=NullRun(),
        shorter=_artifact("stage", Path(spec["shorter"])) if spec.get("shorter") else None,
    )
    try:
        config.run(context)
    except UserError as error:
        return {"error": str(error), "history": context.run.history()}
    return {"history": context.run.history()}


def _artifact(kind: str, path: Path) -> Artifact:
    manifest = Manifest(kind=kind, key="1" * 64, created="", files={}, provenance={}, summary={})
    return Artifact("1" * 64, kind, path, manifest)
