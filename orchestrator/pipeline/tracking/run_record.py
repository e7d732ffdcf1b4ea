"""What a run puts on record in MLflow beside its stages' own metrics: what is run, on what, and what came of it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence

from orchestrator.pipeline.keys.code_digest import digest_of
from orchestrator.pipeline.lease.lease_manager import LeaseLostError
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import StagePlan
from orchestrator.pipeline.store.ledger import PipelineState
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.pipeline.tracking import mlflow_record
from orchestrator.storage.artifacts import Artifact
from orchestrator.tracking.run import Run
from orchestrator.tracking.spool import clean_name

logger = logging.getLogger("orchestrator")


class RunRecord:
    """The records of one run of a pipeline. Trouble with what only MLflow is told is a warning."""

    def __init__(self, loaded: LoadedPipeline, workspace: Workspace) -> None:
        self._loaded, self._workspace = loaded, workspace

    def pipeline(self, root: Run, plans: Sequence[StagePlan], state: PipelineState) -> None:
        """Keep the resolved file in the store and in the pipeline's run."""
        name = f"pipelines/{self._loaded.name}/pipeline.yaml"
        path = self._workspace.record(name, self._loaded.resolved().encode())
        root.tags({"orchestrator.pipeline": self._loaded.name, "orchestrator.file": str(self._loaded.path)})
        root.file(path, "pipeline")
        with _warned():
            mlflow_record.describe(root, self._loaded)
            self._note(root, plans, state)

    def results(
        self,
        root: Run,
        artifacts: Mapping[str, Artifact],
        plans: Sequence[StagePlan],
        state: PipelineState,
    ) -> None:
        """Every artifact by address and digest, what it was made of, and the figures of each stage."""
        with _warned():
            references = mlflow_record.references(self._workspace, artifacts)
            root.text("artifacts.json", json.dumps(references, indent=1) + "\n")
            self._note(root, plans, state)

    def stage(self, run: Run, root: Run, item: StagePlan, inputs: Mapping[str, Artifact]) -> None:
        """What a stage is about to do, and on what."""
        parts = item.stage.parts
        with _warned():
            used = mlflow_record.datasets(self._loaded, self._workspace, item.stage, inputs.values())
            run.datasets(used)
            root.datasets(used)
            mlflow_record.describe(run, self._loaded)
            run.tags({mlflow_record.NOTE: mlflow_record.stage_note(item, inputs, used)})
        run.params(parts.config)
        run.tags(
            {
                "orchestrator.stage": item.name,
                "orchestrator.kind": parts.kind,
                "orchestrator.key": item.stage.key,
                "orchestrator.kind_version": str(parts.version),
                "orchestrator.code": digest_of(item.stage.code),
                "orchestrator.reasons": "; ".join(item.reasons),
                **{f"orchestrator.input.{role}": key for role, key in parts.inputs.items()},
                **{f"orchestrator.data.{name}": value for name, value in parts.data.items()},
            }
        )

    def artifact(self, run: Run, item: StagePlan, artifact: Artifact) -> None:
        """What a stage made: its address and digest, its pieces, and its models."""
        with _warned():
            (own, *pieces) = mlflow_record.references(self._workspace, {item.name: artifact})[item.name]
            run.text("artifacts.json", json.dumps([own, *pieces], indent=1) + "\n")
            run.tags(
                {
                    f"orchestrator.artifact.{name}": own[name]
                    for name in ("uri", "sha256_of_manifest", "bytes")
                }
            )
            uploads = run.tracking_uri is not None
            for model in mlflow_record.models(
                self._loaded, self._workspace, item.stage, artifact, uploads=uploads
            ):
                run.model(model)

    def _note(self, root: Run, plans: Sequence[StagePlan], state: PipelineState) -> None:
        root.tags({mlflow_record.NOTE: mlflow_record.pipeline_note(self._loaded, plans, state)})


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    """What MLflow is told is not worth a stage: trouble with it is a warning."""
    try:
        yield
    except LeaseLostError:
        raise
    except Exception as error:  # a store that is away, a file that somebody removed
        logger.warning("MLflow is missing a record: %s: %s", type(error).__name__, error)


def sum_up(root: Run, stage: str, summary: Mapping[str, float]) -> None:
    """A stage's figures on the pipeline's run: a further point only where they changed since the last."""
    channel = f"summary/{stage}"
    known = root.history(channel)
    # As text: a figure may be NaN, which equals nothing.
    text = json.dumps({clean_name(name): float(value) for name, value in summary.items()})
    if summary and (not known or json.dumps(known[-1]["metrics"]) != text):
        root.metrics(summary, len(known), channel)
