"""More steps for a stage that is done: whether it goes on, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from orchestrator.pipeline.keys.cache_key import KeyParts
from orchestrator.pipeline.keys.more_steps import TiedToSteps
from orchestrator.pipeline.plan.stage_plan import Choice, ResolvedStage, StagePlan, plan
from orchestrator.pipeline.store.ledger import PipelineState, StageState
from orchestrator.stages import AnyStage
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest

CONFIG: dict[str, Any] = {"steps": 100, "batch_size": 8}


def parts(**changes: Any) -> KeyParts:
    return KeyParts(kind="pretrain", config={**CONFIG, **changes}, data={"from": "aa"}, format=2)


def planned(
    new: KeyParts,
    *,
    tied: TiedToSteps | tuple[str, ...] | None = (),
    made: KeyParts | None = None,
    gone: bool = False,
    choice: Choice | None = None,
    known: StageState | None = None,
    reached: str = "",
) -> StagePlan:
    """What happens to a stage whose key is `new`, after one of 100 steps."""
    old = made or parts()
    if isinstance(tied, tuple):
        tied = {("steps",): tied}
    manifest = Manifest(kind="pretrain", key=old.key, created="", files={}, provenance={}, summary={})
    artifact = Artifact(old.key, "pretrain", Path("there"), manifest)
    known = known or StageState("first", state="done", parts=old, made=old)
    stage = ResolvedStage("first", new, new.key, {}, (), {}, tied_to_steps=tied)
    (item,) = plan(
        [stage],
        PipelineState(stages={"first": known}),
        lambda kind, key: artifact if key == old.key and not gone else None,
        reached=lambda kind, key: reached,
        choice=choice or Choice(),
    )
    return item


def test_a_longer_run_goes_on_from_the_shorter_one() -> None:
    item = planned(parts(steps=200))
    assert (item.action, item.shorter is not None) == ("run", True)
    assert item.reasons == ("config.steps: 100 → 200", "goes on from step 100")


def test_a_longer_run_that_was_interrupted_goes_on_from_its_own_checkpoint_if_it_has_one() -> None:
    longer = parts(steps=200)
    begun = StageState("first", state="running", parts=longer, attempts=1, made=parts())
    item = planned(longer, known=begun)
    assert item.shorter is not None
    assert item.reasons == ("attempt 1 was interrupted", "goes on from step 100")
    item = planned(longer, known=begun, reached="step 140")
    assert item.shorter is None
    assert item.reasons == ("attempt 1 was interrupted, goes on from step 140",)


@pytest.mark.parametrize(
    ("tied", "said"),
    [
        (("optimizer.lr",), "starts over: optimizer.lr depends on the number of steps"),
        (("optimizer.lr", "ema"), "starts over: optimizer.lr, ema depend on the number of steps"),
    ],
)
def test_a_schedule_that_depends_on_all_steps_starts_over(tied: tuple[str, ...], said: str) -> None:
    item = planned(parts(steps=200), tied=tied)
    assert item.shorter is None
    assert item.reasons == ("config.steps: 100 → 200", said)


@pytest.mark.parametrize(
    "different",
    [
        {"new": parts(steps=50)},
        {"new": parts(steps=200, batch_size=16)},
        {"new": parts(steps=200).model_copy(update={"data": {"from": "bb"}})},
        {"new": parts(steps=200).model_copy(update={"seed": 1})},
        {"new": parts(steps=200), "tied": None},
        {"new": parts(steps=200), "gone": True},
        {"new": parts(steps=200), "known": StageState("first", state="failed", parts=parts())},
        {"new": parts(steps=200), "choice": Choice(force=("first",))},
    ],
)
def test_anything_else_starts_over(different: dict[str, Any]) -> None:
    item = planned(**different)
    assert (item.action, item.shorter) == ("run", None)
    assert not any("goes on" in reason for reason in item.reasons)


@pytest.mark.parametrize(
    ("change", "tied"),
    [
        ({}, ()),
        ({"optimizer": {"lr": {"peak": 1.0, "warmup_steps": 5, "warmup_shape": "cosine"}}}, ()),
        ({"optimizer": {"lr": {"peak": 1.0, "shape": "cosine"}}}, ("optimizer.lr",)),
        ({"ema": {"peak": 0.9, "end": 1.0, "shape": "linear"}}, ("ema",)),
        ({"from": "a.pth", "gram": {"weight": {"peak": 1, "shape": "cosine"}}}, ("gram.weight",)),
        (
            {"optimizer": {"lr": {"peak": 1.0}, "weight_decay": {"peak": 0.1, "shape": "linear"}},
             "local_weight": {"peak": 1, "shape": "cosine"},
             "teacher_temperature": {"peak": 1, "end": 2, "shape": "linear"}},
            ("optimizer.weight_decay", "teacher_temperature", "local_weight"),
        ),
    ],
)  # fmt: skip
def test_which_schedules_know_the_last_step(change: dict[str, Any], tied: tuple[str, ...]) -> None:
    stage = TypeAdapter(AnyStage).validate_python(
        {"kind": "pretrain", "model": "vit_femto", "steps": 10, "batch_size": 16, "optimizer": {"lr": {"peak": 1.0}},
         "crops": {"global_size": 32, "local_size": 16}, **change}
    )  # fmt: skip
    assert stage.tied_to_steps() == {("steps",): tied}


# --- students ---------------------------------------------------------------------------------------------------

A, B = ("students", "a", "steps"), ("students", "b", "steps")


def taught(steps: int, a: int | None = None, b: int | None = None, **more: Any) -> KeyParts:
    students = {name: {"model": "m", "steps": own} for name, own in (("a", a), ("b", b))}
    return KeyParts(kind="distill", config={"steps": steps, "students": students, **more}, format=2)


@pytest.mark.parametrize(
    ("old", "new", "tied", "said"),
    [
        (taught(100), taught(200), {}, "goes on from step 100"),
        (taught(100, b=50), taught(200, b=50), {B: ("ema",)}, "goes on from step 100"),
        (taught(100, b=50), taught(100, b=70), {A: ("ema",)}, "goes on from step 50"),
        (taught(100, b=50), taught(200, b=70), {}, "a goes on from step 100; b goes on from step 50"),
        (taught(100), taught(100, a=150), {}, "goes on from step 100"),
        (taught(100), taught(200), {B: ("students.b.ema",)},
         "a goes on from step 100; b starts over: students.b.ema depends on the number of steps"),
    ],
)  # fmt: skip
def test_students_go_on_one_by_one(
    old: KeyParts, new: KeyParts, tied: dict[tuple[str, ...], tuple[str, ...]], said: str
) -> None:
    item = planned(new, made=old, tied={A: (), B: (), **tied})
    assert item.shorter is not None
    assert item.reasons[-1] == said


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (taught(200), "starts over: ema depends on the number of steps"),
        (taught(200, window=3), None),
        (taught(200, b=90), None),
        (taught(100), None),
    ],
)
def test_students_start_over(new: KeyParts, said: str | None) -> None:
    item = planned(new, made=taught(100), tied={A: ("ema",), B: ("ema",)})
    assert item.shorter is None
    assert (item.reasons[-1] == said) is (said is not None)


def test_each_student_has_schedules_of_its_own() -> None:
    still = {"peak": 0.9}
    students = {
        "a": {"model": "vit_femto"},
        "b": {"model": "vit_femto", "ema": {"peak": 0.9, "end": 1.0, "shape": "cosine"}},
        "c": {"model": "vit_femto", "optimizer": {"lr": {"peak": 1.0, "shape": "linear"}}},
    }
    stage = TypeAdapter(AnyStage).validate_python(
        {"kind": "distill", "students": students, "steps": 10, "batch_size": 16, "optimizer": {"lr": {"peak": 1.0}},
         "crops": {"global_size": 32, "local_size": 16}, "ema": still}
    )  # fmt: skip
    assert stage.tied_to_steps() == {
        ("students", "a", "steps"): (),
        ("students", "b", "steps"): ("students.b.ema",),
        ("students", "c", "steps"): ("students.c.optimizer.lr",),
    }
    default = stage.model_copy(update={"ema": type(stage).model_fields["ema"].default})
    assert default.tied_to_steps()["students", "a", "steps"] == ("ema",)
