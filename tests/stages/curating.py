"""What a curation gets from the pipeline, for tests that curate."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.stages.base import Context
from orchestrator.tracking.run import NullRun


def curation_context(tmp_path: Path, seed: int = 0, **sources: DataSource) -> Context:
    """A context with a new folder for the results, and one folder for work in progress."""
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    out.mkdir()
    return Context(
        name="curate",
        pipeline="test",
        seed=seed,
        key="k",
        inputs={},
        keys={},
        sources=sources,
        out=out,
        work=tmp_path / "work",
        elastic=Elastic(),
        run=NullRun(),
    )
