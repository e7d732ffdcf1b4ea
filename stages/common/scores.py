"""What an evaluation found of one model, read from its `table.json`: metrics, and those of baselines beside them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.storage.artifacts import Artifact

KNN, ZERO_SHOT = "knn", "zero_shot"
# Of models for images and texts.
TEXT_METRICS = (
    ZERO_SHOT,
    *(f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
)
BASELINES = ("raw_pixels", "random_weights", "majority")
_TABLE = "table.json"
_RAW_PIXELS, _MAJORITY, _RANDOM = "raw pixels", "majority group", "random weights"
# What the row of the last backbone ends with.
_TEACHER = " (teacher)"


@dataclass(frozen=True)
class Scores:
    """What an evaluation found of one model.

    Attributes:
        metrics: by name. A metric of a user's package is `TITLE/FIGURE`, and `TITLE` too if it has one figure.
        baselines: metrics of raw pixels, of random weights of the same model at the same size, and of always
            giving the largest group, as far as there are any.
        num_photos, k: of the k-NN; 0 where there is none.
        chosen: what validation chose for the k-NN of test photos, such as `k=10, validation 0.412`; None if the
            evaluation has no split, and the k-NN is leave-one-out.
        picture: the file of the evaluation that shows this model's feature maps, if it drew some.
    """

    metrics: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    num_photos: int = 0
    k: int = 0
    picture: str | None = None
    chosen: str | None = None

    def error(self, accuracy: float) -> float:
        """One standard error of a k-NN accuracy."""
        return math.sqrt(accuracy * (1 - accuracy) / self.num_photos) if self.num_photos else math.nan


def has_baseline(metric: str, baseline: str) -> bool:
    """Whether evaluations compute a metric of a baseline, too."""
    if baseline == "majority":
        return metric in (KNN, ZERO_SHOT)
    return metric == KNN if baseline == "raw_pixels" else metric not in TEXT_METRICS


def read_scores(evaluation: Artifact, model: Artifact, name: str) -> Scores | None:
    """What an evaluation found of one of the models of an artifact; None if it did not look at it.

    Args:
        evaluation: of a stage of kind `evaluate`.
        model: the artifact that has the model.
        name: the model's name in its stage; empty for the only one.
    """
    inputs = evaluation.manifest.provenance.get("parts", {}).get("inputs", {})
    role = next((role for role, key in inputs.items() if key == model.key), None)
    if inputs and role is None:
        return None
    table = json.loads((evaluation.path / _TABLE).read_text(encoding="utf-8"))
    if role == "text":
        return _of_texts(table, _existing(evaluation, "text_maps.png"))
    knn, measured = table["knn"], table.get("metrics", {})
    rows: Sequence[Mapping[str, Any]] = knn["rows"]
    # Without labels there are no rows, and still metrics of users' packages.
    known = [str(one["name"]) for one in rows if "name" in one] or [
        one for by_model in measured.values() for one in by_model
    ]
    title = _title(known, model.kind, name)
    row = next((one for one in rows if _is_of(one, name, title)), None)
    # A metric may be called as the table is.
    metrics = _measured(measured, title) | ({KNN: float(row["accuracy"])} if row else {})
    if not metrics:
        return None
    picture = f"pca_{name}.png" if name else "pca_teacher.png" if title.endswith(_TEACHER) else None
    return Scores(
        metrics,
        _baselines(rows, row or {}, measured),
        int(knn["num_photos"]),
        int(knn["k"]),
        _existing(evaluation, picture),
        str((row or {}).get("figure", {}).get("note", "")) if "split" in table else None,
    )


def _title(known: Sequence[str], kind: str, name: str) -> str:
    """What a model is called in the report; empty if it is not there."""
    if name:
        return f"student {name}"
    # Earlier snapshots of the stage have rows of their own, before that of its last step.
    own = re.compile(rf"{re.escape(kind)}(, step \d+)?({re.escape(_TEACHER)})?")
    return next((title for title in reversed(known) if own.fullmatch(title)), "")


def _is_of(row: Mapping[str, Any], name: str, title: str) -> bool:
    return row.get("student") == name if name else bool(title) and row.get("name") == title


def _measured(measured: Mapping[str, Any], title: str) -> dict[str, float]:
    """The figures of users' metrics for the row `title`."""
    found: dict[str, float] = {}
    for metric, by_model in measured.items():
        figures = by_model.get(title, {})
        found |= {f"{metric}/{figure}": float(value) for figure, value in figures.items()}
        if len(figures) == 1:
            found[metric] = float(next(iter(figures.values())))
    return found


def _baselines(
    rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    by_name = {str(one.get("name")): float(one["accuracy"]) for one in rows}
    found = {
        baseline: {KNN: by_name[title]}
        for baseline, title in (("raw_pixels", _RAW_PIXELS), ("majority", _MAJORITY))
        if title in by_name
    }
    untrained = next((one for one in rows if row and _is_untrained(one, row)), None)
    if untrained is not None:
        own = _measured(measured, str(untrained["name"]))
        found["random_weights"] = {**own, KNN: float(untrained["accuracy"])}
    return found


def _is_untrained(one: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a row is of random weights of the model of another row, at its size of photos."""
    same = all(one.get(part) == row.get(part) for part in ("model", "image_size"))
    return one.get("family") == _RANDOM and same


def _of_texts(table: Mapping[str, Any], picture: str | None) -> Scores:
    retrieval, zero_shot = table.get("retrieval") or {}, table.get("zero_shot") or {}
    metrics = {name: float(retrieval[name]) for name in TEXT_METRICS if name in retrieval}
    baselines = {}
    if zero_shot:
        metrics[ZERO_SHOT] = float(zero_shot["accuracy"])
        baselines["majority"] = {ZERO_SHOT: float(zero_shot["majority"])}
    return Scores(metrics, baselines, picture=picture)


def _existing(evaluation: Artifact, name: str | None) -> str | None:
    return name if name is not None and Path(evaluation.path, name).is_file() else None
