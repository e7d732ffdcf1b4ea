"""Checkpoints in a folder, as tests look at them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.training.checkpoint.format import CheckpointError, CheckpointManifest, step_of, verified


def latest(folder: Path) -> CheckpointManifest | None:
    """The newest checkpoint below `folder` that is committed and whose files are all as written."""
    steps = {path: step for path in folder.glob("step-*") if (step := step_of(path.name)) is not None}
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        try:
            return verified(path)
        except CheckpointError:
            continue
    return None
