"""Costs of a distillation's parts: measured for real once, then kept, by all that decides them and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.capacity import measured_costs as profiles
from orchestrator.capacity.measured_costs import Profile, fit
from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.distill import profiling
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.distill.profiling import Material, Spec, measured

STAGE: dict[str, Any] = {
    "kind": "distill",
    "needs": ["curate", "pretrain"],
    "steps": 10,
    "batch_size": 16,
    "block_size": 4,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 1e-3}},
    "students": {"a": {"model": "vit_femto"}, "b": {"model": "vit_femto", "steps": 5}},
}
HEADS = Heads(hidden=16, dino_bottleneck=8, dino_prototypes=12, ibot_bottleneck=8, ibot_prototypes=12)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=32)
MACHINE = {"device": "cpu", "devices": 1, "processor": "test", "cores": 1, "threads": 1, "torch": "0"}


class Lab:
    """Measuring processes that answer from a table, and what they were told."""

    def __init__(self) -> None:
        self.told: list[Spec] = []
        self.answers = {"": {"1": 0.75, "2": 1.25}, "a": {"1": 0.5, "2": 1.0}, "b": {"1": 0.25, "2": 0.5}}
        self.pair_s = 0.8

    def __call__(self, specs: list[Spec], gpu: bool) -> list[dict[str, dict[str, float]]]:
        self.told += specs
        if specs[0].world == 2:
            return [{name: {"2": self.pair_s} for name in spec.students} for spec in specs]
        return [
            {name: self.answers[name] for name in ("", *spec.students) if name or spec.with_teacher}
            for spec in specs
        ]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "hardware", lambda wanted: dict(MACHINE))
    lab = Lab()
    monkeypatch.setattr(profiling, "_run", lab)
    return lab


def material(**changes: Any) -> Material:
    return Material(Distill.model_validate({**STAGE, **changes}), RECIPE)


@pytest.mark.heavy
def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real teacher and the real task in a process of their own, on made-up weights and photographs."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(profiles, "hardware", lambda wanted: dict(MACHINE))
    said: list[str] = []
    costs = measured(material(students={"a": {"model": "vit_femto"}}), say=said.append)
    assert said == ["measuring the teacher, a: about a minute, and at most 15 min on a busy machine"]
    assert 0 < costs.teacher.step_s < 60
    (student,) = costs.students
    assert (student.name, student.num_blocks, student.steps) == ("a", 4, 10)
    assert 0 < student.block_s < 60
    kept = [Profile.model_validate_json(path.read_text()) for path in (tmp_path / "profiles").glob("*.json")]
    assert {one.block_s for one in kept} >= {student.block_s}
    assert len(kept) == 2
    monkeypatch.setattr(profiling, "_run", None)
    assert measured(material(students={"a": {"model": "vit_femto"}})) == costs, "not measured again"


@pytest.mark.heavy
@pytest.mark.parametrize("own", [False, True], ids=["from elsewhere", "the stage's own"])
def test_a_teacher_without_heads_is_measured_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: bool
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "hardware", lambda wanted: dict(MACHINE))
    save_pretrained(tmp_path / "net", build("vit_femto").state_dict(), "vit_femto")
    teachers = {"net": {"from": str(tmp_path / "net")}}
    features = {} if own else {"teachers": teachers, "whiten": True, "whiten_images": 4}
    stage = Distill.model_validate({**STAGE, "features": features, "students": {"a": {"model": "vit_femto"}}})
    costs = measured(Material(stage, RECIPE if own else None))
    assert 0 < costs.teacher.step_s < 60
    assert 0 < costs.students[0].block_s < 60


def test_another_file_is_another_teacher(lab: Lab, tmp_path: Path) -> None:
    def headless(model: str) -> Material:
        save_pretrained(tmp_path / model, build(model).state_dict(), model)
        teachers = {"net": {"from": str(tmp_path / model)}}
        return Material(Distill.model_validate({**STAGE, "features": {"teachers": teachers}}), None)

    measured(headless("vit_femto"))
    lab.told.clear()
    measured(headless("vit_femto"))
    assert not lab.told
    measured(headless("vit_pico"))
    assert [(spec.with_teacher, spec.students) for spec in lab.told] == [(True, ("a", "b"))]


def test_costs_follow_from_steps_of_one_and_of_two_blocks(lab: Lab) -> None:
    costs = measured(material())
    assert costs.teacher.step_s == pytest.approx(0.25 + 4 * 0.5)
    a, b = costs.students
    assert (a.fixed_s, a.block_s, a.steps) == (0.0, 0.5, 10)
    assert (b.fixed_s, b.block_s, b.steps) == (0.0, 0.25, 5)
    assert "measured on a core of test, 20" in costs.source
    assert costs.kind == "cpu"
    assert [spec.world for spec in lab.told] == [1], "one core has no room for two workers"


def test_every_core_is_busy_and_two_workers_are_tried(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "hardware", lambda wanted: {**MACHINE, "devices": 4, "cores": 4})
    a, b = measured(material()).students
    assert [(spec.world, spec.rank) for spec in lab.told] == [(1, 0)] * 4 + [(2, 0), (2, 1)]
    assert len({spec.meeting for spec in lab.told}) == 5, "only the pair meets"
    # On two workers each has a block; what is longer than a step of one block is the exchange.
    assert a.exchange_s == pytest.approx(0.8 - 0.5)
    assert b.exchange_s == pytest.approx(0.8 - 0.25)
    assert b.step_s(2) == pytest.approx(2 * 0.25 + 0.55)


def test_only_what_is_new_is_measured(lab: Lab) -> None:
    measured(material())
    lab.told.clear()
    measured(material())
    assert not lab.told
    students = {**STAGE["students"], "c": {"model": "vit_pico"}}
    lab.answers["c"] = {"1": 1.0, "2": 2.0}
    measured(material(students=students))
    assert [(spec.with_teacher, spec.students) for spec in lab.told] == [(False, ("c",))]
    lab.told.clear()
    measured(material(), refresh=True)
    assert [(spec.with_teacher, spec.students) for spec in lab.told] == [(True, ("a", "b"))]


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 99},
        {"batch_size": 64},
        {"optimizer": {"lr": {"peak": 1.0}}},
        {"students": {**STAGE["students"], "b": {"model": "vit_femto", "steps": 7, "joins": "now"}}},
        {"window": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_costs_nothing_does_not_measure_anew(lab: Lab, changes: dict[str, Any]) -> None:
    measured(material())
    lab.told.clear()
    measured(material(**changes))
    assert not lab.told


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"block_size": 8}, (True, ("a", "b"))),
        ({"crops": {**STAGE["crops"], "num_local": 3}}, (True, ("a", "b"))),
        ({"precision": "bf16"}, (True, ("a", "b"))),
        ({"chunk_rows": 5}, (True, ("a", "b"))),
        ({"students": {**STAGE["students"], "b": {"model": "vit_pico"}}}, (False, ("b",))),
        ({"students": {**STAGE["students"], "b": {"model": "vit_femto", "zero_stage": 1}}}, (False, ("b",))),
        (
            {"students": {**STAGE["students"], "b": {"model": "vit_femto", "views": {"global_size": 48}}}},
            (True, ("b",)),
        ),
    ],
)
def test_what_changes_a_cost_is_measured_anew(
    lab: Lab, changes: dict[str, Any], parts: tuple[bool, tuple[str, ...]]
) -> None:
    measured(material())
    lab.told.clear()
    measured(material(**changes))
    assert [(spec.with_teacher, spec.students) for spec in lab.told] == [parts]


def test_another_machine_measures_for_itself(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(material())
    lab.told.clear()
    monkeypatch.setattr(profiles, "hardware", lambda wanted: {**MACHINE, "processor": "another"})
    measured(material())
    assert len(lab.told) == 1


def test_a_spoilt_file_is_measured_again(lab: Lab, tmp_path: Path) -> None:
    measured(material())
    for path in (tmp_path / "cache" / "profiles").glob("*.json"):
        path.write_text(json.dumps({"fixed_s": -1}))
    lab.told.clear()
    measured(material())
    assert len(lab.told) == 1


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    monkeypatch.setattr(profiles, "hardware", lambda wanted: dict(MACHINE))
    monkeypatch.setattr(profiling, "_MODULE", "orchestrator.no_such_module")
    with pytest.raises(UserError, match=r"could not be measured .*no_such_module") as caught:
        measured(material())
    assert "hardware" in (caught.value.hint or "")
    assert not list(tmp_path.rglob("*.json"))


def test_fit_never_gives_less_than_nothing() -> None:
    assert fit(0.75, 1.25) == (0.25, 0.5)
    assert fit(0.5, 0.5) == (0.0, 0.25), "noise"
    assert fit(0.5, 1.5) == (0.0, 0.75), "a second block dearer than the first one whole"
