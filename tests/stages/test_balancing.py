"""From a stage and the cluster to quotas; what a part costs is given."""

from __future__ import annotations

import pytest

from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.capacity.contention import AROUND_CORES
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.distill import balancing
from orchestrator.stages.distill.balancing import balancer
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.profiling import Material, PartCosts

COSTS = PartCosts(
    TeacherCost(0.5),
    (StudentCost("a", 4, 1.0), StudentCost("b", 4, 1.0), StudentCost("c", 4, 1.0)),
    "measured",
    "cpu",
)


@pytest.fixture
def material(monkeypatch: pytest.MonkeyPatch) -> Material:
    stage = Distill.model_validate(
        {
            "kind": "distill",
            "steps": 10,
            "batch_size": 16,
            "block_size": 4,
            "optimizer": {"lr": {"peak": 1e-3}},
            "students": {name: {"model": "vit_s"} for name in "abc"},
        }
    )
    monkeypatch.setattr(balancing, "measured", lambda material, say: COSTS)
    monkeypatch.setattr(balancing, "cores", lambda: 2)
    return Material(stage, ModelRecipe(model="vit_s", drop_path=0.0, heads=Heads(), global_size=256))


def test_only_those_with_steps_left_and_within_their_bounds(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancing, "cluster_devices", lambda kind: 8.0)
    made = balancer(material, {"a": 7, "b": 3, "c": 0}, {"b": (1, 1)})
    split = made.split
    assert split is not None
    assert dict(split.workers) == {"a": 1, "b": 1}, "b is fixed, and more for a would not help"
    assert not split.shared
    free = balancer(material, {"a": 7, "b": 3}, {"a": (2, 3)})
    assert free.quota("a")() == (2, 2)
    assert free.quota("b")() == (1, 2)
    assert free.teachers() == 1


def test_a_laptops_cores_are_shared(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "cluster_devices", lambda kind: 2.0)
    split = balancer(material, dict.fromkeys("abc", 5), {}).split
    assert split is not None
    assert split.shared
    assert split.bound_s == pytest.approx(12.5 / 2)
    assert split.step_s == pytest.approx(12.5 / (2 - AROUND_CORES)), "all are ready all the time"
