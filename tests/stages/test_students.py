"""Who begins where, what is refused, and what a stage gathers of its students."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import Stopped, UserError
from orchestrator.stages.base import Part
from orchestrator.stages.distill import student_runs, students
from orchestrator.stages.distill.config import Distill
from orchestrator.storage.local import LocalStore

STAGE: Mapping[str, Any] = {
    "kind": "distill", "students": {"a": {"model": "vit_femto"}, "b": {"model": "vit_femto", "steps": 50}},
    "steps": 80, "batch_size": 8, "block_size": 4, "optimizer": {"lr": {"peak": 1e-3}},
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
}  # fmt: skip
LATE = {"model": "vit_femto", "joins": "now", "steps": 20}


def never(folder: Path, figures: Mapping[str, float]) -> Path:
    raise AssertionError


def part(folder: Path, *, done: bool = False, remote: tuple[LocalStore, str] | None = None) -> Part:
    return Part(folder / "work", remote, folder / "done" if done else None, "f" * 64, never)


def job(step: int) -> Any:
    """A student's job whose newest checkpoint is after `step` updates."""
    committed = [step] if step else []
    return SimpleNamespace(checkpoint_storage=SimpleNamespace(committed=lambda: committed))


@pytest.mark.parametrize(
    ("steps", "done", "front"),
    [
        ({"a": 30, "b": 12, "late": 0}, (), 12),
        ({"b": 0, "late": 0}, ("a",), 0),
        ({"late": 0}, ("a", "b"), 80),
        ({"late": 0}, ("b",), 50),
    ],
    ids=[
        "the slowest that trains",
        "one that has not begun",
        "the end of the longest",
        "of one that is done",
    ],
)
def test_one_that_joins_late_begins_where_the_others_are(
    tmp_path: Path, steps: dict[str, int], done: tuple[str, ...], front: int
) -> None:
    config = Distill.model_validate({**STAGE, "students": {**STAGE["students"], "late": LATE}})
    parts = {name: part(tmp_path / name, done=name in done) for name in (*steps, *done)}
    jobs = {name: job(step) for name, step in steps.items()}
    assert student_runs._front(config, jobs, parts) == front


@pytest.mark.parametrize("remote", [False, True])
def test_where_one_began_is_decided_once(tmp_path: Path, remote: bool) -> None:
    store = (LocalStore(tmp_path / "store"), "work/student-x/") if remote else None
    assert student_runs._offset(part(tmp_path / "here", remote=store), "distill/late", 12) == 12
    other = "elsewhere" if remote else "here"
    assert student_runs._offset(part(tmp_path / other, remote=store), "distill/late", 40) == 12


def test_a_window_that_does_not_fit_is_refused_with_one_that_does() -> None:
    config = Distill.model_validate(STAGE)
    config.check_room(3, int(10e9), 45e9, "stages.distill.window")
    with pytest.raises(
        UserError, match=r"6 steps of 9.3 GiB each are kept at the same time.*has 41.9 GiB"
    ) as caught:
        config.check_room(5, int(10e9), 45e9, "stages.distill.window")
    assert caught.value.where == "stages.distill.window"
    assert caught.value.hint == "set window to 3"
    with pytest.raises(UserError) as caught:
        config.check_room(2, int(10e9), 15e9, "stages.distill.window")
    assert caught.value.hint == "set views: regenerated, or a smaller batch_size"


def test_all_students_are_gathered_without_their_checkpoints(tmp_path: Path) -> None:
    folders = {}
    for name, goodput in (("a", 0.5), ("b", 0.25)):
        folder = folders[name] = tmp_path / name
        for file in (
            "model/model.safetensors",
            "checkpoint/shard",
            "recipe.json",
            "history.json",
            "artifact.json",
        ):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(name)
        (folder / "figures.json").write_text(json.dumps({"goodput": goodput, "last_loss": 1.0}))
    (tmp_path / "out").mkdir()
    figures = students._gather(folders, ["a", "b"], tmp_path / "out")
    assert figures == {
        "a_goodput": 0.5, "a_last_loss": 1.0, "b_goodput": 0.25, "b_last_loss": 1.0, "goodput": 0.25,
    }  # fmt: skip
    for name in ("a", "b"):
        own = tmp_path / "out" / "students" / name
        assert (own / "model" / "model.safetensors").read_text() == name
        assert not (own / "checkpoint").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"students": {"a/b": {"model": "vit_femto"}}}, "should match pattern"),
        (
            {"students": {"a": {"model": "vit_femto", "views": {"global_size": 36}}}},
            r"global_size 36 .* use 32",
        ),
        (
            {"students": {"a": {"model": "vit_femto", "views": {"global_size": 64, "local_size": 20}}}},
            "use 16",
        ),
        ({"koleo_group": 3}, "koleo_group 3 does not divide block_size .*; use [24]"),
        (
            {"students": {"a": {"model": "vit_femto", "model_overrides": {"patch": 4}}}},
            "did you mean patch_size",
        ),
        (
            {"students": {"a": {"model": "vit_femto", "model_overrides": {"drop_path": 0.1}}}},
            "drop_path is a key beside model",
        ),
        (
            {"students": {"a": {"model": "vit_femto", "model_overrides": {"patch_size": 12}}}},
            "not a multiple of vit_femto's patch size 12",
        ),
        ({"teachers": 0}, "at least 1 is needed"),
        ({"teacher_shards": 2, "teacher_cache": True}, "cannot be combined"),
        ({"teacher_shards": 2, "features": {}}, "for teachers with heads"),
        ({"features": {"repeat_after": 2}, "views": "regenerated"}, "cannot be combined"),
        ({"features": {"repeat_after": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distill.model_validate({**STAGE, **change})


def test_teachers_from_elsewhere_need_no_stage_that_made_them() -> None:
    roles = [wanted.role for wanted in Distill.model_validate(STAGE).wants()]
    assert roles == ["index", "teacher"]
    foreign = Distill.model_validate({**STAGE, "features": {"teachers": {"x": {"module": "a.b:c"}}}})
    assert [wanted.role for wanted in foreign.wants()] == ["index"]
    own = Distill.model_validate({**STAGE, "features": {"whiten": True}})
    assert [wanted.role for wanted in own.wants()] == ["index", "teacher"]


def failed(**errors: Exception | None) -> dict[str, Future[None]]:
    """Students that have ended, with what went wrong."""
    futures: dict[str, Future[None]] = {}
    for name, error in errors.items():
        futures[name] = Future()
        if error is None:
            futures[name].set_result(None)
        else:
            futures[name].set_exception(error)
    return futures


def mistake(what: str = "the photos are gone") -> UserError:
    return UserError(what, where="data.photos", hint="bring them back")


def test_a_mistake_that_all_students_find_is_told_once() -> None:
    with pytest.raises(UserError) as caught:
        students._raise_first(failed(a=mistake(), b=mistake(), c=None))
    assert (caught.value.what, caught.value.where, caught.value.hint) == (
        "the photos are gone", "data.photos", "bring them back",
    )  # fmt: skip


def test_different_mistakes_are_one_mistake_on_one_line() -> None:
    with pytest.raises(UserError) as caught:
        students._raise_first(failed(a=mistake(), b=mistake("too few"), c=None))
    assert caught.value.what == "a: the photos are gone; b: too few; c finished and is kept"
    assert (caught.value.where, caught.value.hint) == ("data.photos", "bring them back")
    with pytest.raises(UserError) as caught:
        students._raise_first(failed(a=UserError("x", where="here"), b=UserError("y", where="there")))
    assert (caught.value.where, caught.value.hint) == (None, None)


def test_a_mistake_beside_a_failure_is_a_failure_on_one_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        students._raise_first(failed(a=mistake(), b=ValueError("NaN")))
    assert str(caught.value) == "a: the photos are gone; b: NaN"
    with pytest.raises(Stopped):
        students._raise_first(failed(a=mistake(), b=Stopped()))


def test_draws_are_counted_to_the_end_of_the_last_student() -> None:
    config = Distill.model_validate(
        {**STAGE, "students": {"a": {"model": "vit_femto", "steps": 120}, "late": LATE}}
    )
    figures = {"a_first_step": 0.0, "late_first_step": 30.0}
    assert students._last_step(config, figures) == 120
    assert students._last_step(config, figures | {"late_first_step": 110.0}) == 130
    assert students._last_step(config, {}) == 120, "figures of earlier versions do not say where it began"
