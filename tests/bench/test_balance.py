"""The pipeline that `python -m bench balance` runs, and how its figure is computed; nothing is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.capacity.contention import Busy, shared_s
from orchestrator.data import samples
from orchestrator.pipeline.cost.device_split import StageSplit
from orchestrator.pipeline.load import load
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.profiling import PartCosts

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import balance
from bench.balance import Stage


def test_its_pipeline_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "fetch_food", lambda out: 0)
    balance._write(tmp_path, balance._CASES, steps=7)
    loaded = load(tmp_path / "pipeline.yaml", [], needs_data=False)
    stages = {name: stage for name, stage in loaded.spec.stages.items() if isinstance(stage, Distill)}
    assert list(stages) == list(balance._CASES)
    assert all(stage.steps == 7 and len(stage.students) == 2 for stage in stages.values())


def test_its_figure_is_the_worst_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two cores, 4 s of work; one stage took half as long again as was said, the other a twentieth."""
    monkeypatch.setattr(balance, "_cores", lambda: 2)
    costs = PartCosts(TeacherCost(1.0), (StudentCost("s0", 2, 0.5), StudentCost("s1", 2, 1.0)), "here", "cpu")
    said = shared_s(Busy(1.0), 1, {"s0": Busy(1.0), "s1": Busy(2.0)}, 2)
    found = [StageSplit(name, costs, (), 0.0, 0.0) for name in ("light", "even")]
    dearer = PartCosts(costs.teacher, (costs.students[0], StudentCost("s1", 2, 1.3)), "here", "cpu")
    again = [found[0], StageSplit("even", dearer, (), 0.0, 0.0)]
    real = {"light": Stage(1.5 * said, 6.0), "even": Stage(1.05 * said, 4.2)}
    claim = balance._claim([found, again], real)
    assert claim.figure == pytest.approx(1 / 3)
    assert claim.met is False
    assert claim.arms["even: s a step predicted"].low == pytest.approx(said)
    said_again = shared_s(Busy(1.0), 1, {"s0": Busy(1.0), "s1": Busy(2.6)}, 2)
    worst = balance._claim([found, again], {**real, "light": Stage(said, 5.0)}).figure
    assert worst == pytest.approx(said_again / (1.05 * said) - 1), (
        "one of two predictions is not averaged away"
    )
