"""Evaluation with metrics of a user's own file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.data.index import ImageIndex
from orchestrator.stages.base import Context

from .evaluating import (
    SIZE,
    one_thread,
    small,
    stage,
)

__all__ = ["one_thread", "small"]


METRIC = """
import orchestrator

class Shapes(orchestrator.Metric):
    def measure(self, features):
        count, width = features.cls_ND.shape
        _, patches, same = features.patches().shape
        named = sum(label is not None for label in features.labels)
        assert same == width and len(features.photos) == count
        return {"photos": count, "patches": patches, "labels": named}

class Word(orchestrator.Metric):
    def measure(self, features): return "good"
"""


@pytest.fixture
def own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of two metrics, each of them one file away from a pipeline."""
    (tmp_path / "own_metric.py").write_text(METRIC)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_metric", raising=False)
    return "own_metric"


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_metric_of_a_file_stands_in_results_and_report(
    small: Context, own_metric: str, with_labels: bool
) -> None:
    folder = small.inputs["index"].path
    if not with_labels:
        index = ImageIndex.load(folder)
        ImageIndex([replace(index[row], label=None) for row in range(len(index))]).save(folder)
    summary = stage(metrics=[{"use": f"{own_metric}:Shapes", "name": "shapes"}]).run(small)
    photos = 14 if with_labels else 15
    expected = {"photos": photos, "patches": (SIZE // 8) ** 2, "labels": photos if with_labels else 0}
    table = json.loads((small.out / "table.json").read_text())["metrics"]
    assert set(table) == {"shapes"}
    assert {"random vit_femto", "pretrain, step 6 (teacher)"} < set(table["shapes"])
    assert all(found == expected for found in table["shapes"].values())
    assert {name: summary[f"shapes_{name}_teacher"] for name in expected} == expected
    assert "<h2>shapes</h2>" in (small.out / "report.html").read_text().replace(' id="shapes"', "")
    assert "## shapes" in (small.out / "table.md").read_text()


def test_a_metric_that_gives_no_figures_is_told(small: Context, own_metric: str) -> None:
    with pytest.raises(
        TypeError, match=r"own_metric:Word.measure gave str, not a mapping of names to numbers"
    ):
        stage(metrics=[f"{own_metric}:Word"]).run(small)
