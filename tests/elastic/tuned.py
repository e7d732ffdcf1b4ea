"""A `finetune` job in workers without Ray: its own task and blocks, with the real loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from orchestrator.config.elastic import Elastic
from orchestrator.data.index import ImageIndex
from orchestrator.stages import AnyStage
from orchestrator.stages.base import Context
from orchestrator.stages.finetune.pictures import Indexed
from orchestrator.stages.finetune.run import labelled_rows, training_job
from orchestrator.stages.finetune.start import StartingBackbone
from orchestrator.storage.artifacts import Artifact, Manifest
from orchestrator.tracking.run import NullRun
from orchestrator.training.job import Job


def make_job(spec: dict[str, Any]) -> Job:
    """The job of `config` on `index`, from the model folder `start`, in `work`."""
    config: Any = TypeAdapter(AnyStage).validate_python(spec["config"])
    folder, work = Path(spec["index"]), Path(spec["work"])
    manifest = Manifest(kind="curate", key="1" * 64, created="", files={}, provenance={}, summary={})
    context = Context(
        name="tuned",
        pipeline="test",
        seed=0,
        key="0" * 64,
        inputs={"index": Artifact("1" * 64, "curate", folder, manifest)},
        keys={},
        sources={},
        out=work / "out",
        work=work,
        elastic=Elastic(checkpoint_every_s=1e9, device="cpu", exact=spec.get("exact", False)),
        run=NullRun(),
    )
    labelled = labelled_rows(config, context, ImageIndex.load(folder))
    start = StartingBackbone(Path(spec["start"]), config.image_size)
    job: Job = training_job(config, context, start, Indexed(folder), labelled)
    return job
