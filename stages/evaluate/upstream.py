"""What the artifacts of earlier stages say to an evaluation: snapshots, students, histories, what was drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.stages.base import Context
from orchestrator.stages.common.mixing import DRAWN

if TYPE_CHECKING:
    from orchestrator.data.index import ImageIndex
    from orchestrator.stages.evaluate.results import ClusterDraws
    from orchestrator.storage.artifacts import Artifact

# In the order of the recipe: the last one there is gives the teacher.
TEACHER_ROLES = ("pretrain", "gram", "high_res")


def snapshot_steps(folder: Path) -> dict[int, Path]:
    """Step → snapshot file, ascending; the last is the stage's final model."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted(folder.glob("step-*.safetensors"))}


def student_folders(artifact: Artifact | None) -> dict[str, Path]:
    """Name → folder of every student of a `distill` artifact, by name."""
    if artifact is None:
        return {}
    return {path.name: path for path in sorted((artifact.path / "students").iterdir()) if path.is_dir()}


def has_weights(backbones: Mapping[str, Artifact]) -> bool:
    """Whether a backbone's training started from weights, or there is no backbone."""
    configs = [one.manifest.provenance.get("parts", {}).get("config", {}) for one in backbones.values()]
    return not configs or any(config.get("from") for config in configs)


def taught_elsewhere(students: Artifact | None) -> bool:
    """Whether students learned from teachers that no stage of the pipeline made."""
    if students is None:
        return False
    inputs = students.manifest.provenance.get("parts", {}).get("inputs", {})
    return bool(inputs) and "teacher" not in inputs


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of a training stage in the order of their steps."""
    records: list[dict[str, Any]] = json.loads((folder / "history.json").read_text())
    return sorted(records, key=lambda record: int(record["step"]))


def other_histories(context: Context) -> dict[str, list[dict[str, Any]]]:
    found = {
        f"student {name}": history(folder)
        for name, folder in student_folders(context.inputs.get("students")).items()
    }
    if "text" in context.inputs:
        found["align_text"] = history(context.inputs["text"].path)
    return found


def pool_draws(index: ImageIndex) -> list[ClusterDraws]:
    """The photos of the index, and those of them that the curation chose, by cluster."""
    import numpy as np

    from orchestrator.data.curation.components import HELD_OUT, LEFT_OUT
    from orchestrator.data.curation.mix import by_cluster, effective_number
    from orchestrator.stages.evaluate.results import ClusterDraws

    raw_N = np.ones(len(index), dtype=np.int64)
    chosen_N = raw_N.copy()
    chosen_N[index.rows_of(LEFT_OUT)] = chosen_N[index.rows_of(HELD_OUT)] = 0
    left_out = 1 - float(chosen_N.mean())
    return [
        ClusterDraws(name, counts, effective_number(list(counts.values())), share)
        for name, counts, share in (
            ("raw", by_cluster(index.clusters, raw_N), left_out),
            ("chosen", by_cluster(index.clusters, chosen_N), 0.0),
        )
    ]


def stage_draws(context: Context) -> dict[str, ClusterDraws]:
    """What the stages upstream drew; an artifact of an older version says nothing of it."""
    from orchestrator.stages.evaluate.results import ClusterDraws

    found = {}
    for role in (*TEACHER_ROLES, "students", "text"):
        if role not in context.inputs or not (path := context.inputs[role].path / DRAWN).is_file():
            continue
        kind, record = context.inputs[role].kind, json.loads(path.read_text())
        counts = {int(number): count for number, count in record["clusters"].items()}
        found[kind] = ClusterDraws(kind, counts, record["effective_clusters"], record["left_out"])
    return found


def sharing(context: Context) -> dict[str, float]:
    if "students" not in context.inputs:
        return {}
    shared: dict[str, float] = json.loads((context.inputs["students"].path / "sharing.json").read_text())
    return shared
