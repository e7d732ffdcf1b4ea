"""Stages of users' packages that raise, return nonsense or name things badly: one error each, and no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from driving import run

from orchestrator.errors import UserError
from orchestrator.pipeline.check import pipeline_check as checking
from orchestrator.pipeline.load import load
from orchestrator.stages.base import Context

ESCAPE = "\x1b[31m"


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def returns(value: Any) -> Callable[..., Any]:
    def method(self: Any, *_: Any) -> Any:
        if _ and isinstance(_[0], Context) and _[0].out.is_dir():
            (_[0].out / "result.json").write_text("{}")
        if isinstance(value, BaseException):
            raise value
        return value

    return method


@pytest.mark.parametrize(
    "value",
    [None, [], "text", {"x": "text"}, {1: 2.0}, {ESCAPE: 1.0}, {"a\nb": 1.0}, {"n" * 300: 1.0}, {"x": None},
     {f"{number}": 1.0 for number in range(10_001)}],
)  # fmt: skip
def test_what_run_returns_is_checked(pipeline: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(toys.Curate, "run", returns(value))
    code, said = run(pipeline)
    assert code == 2
    assert "`run` returned" in said
    assert "return a mapping" in said
    assert ESCAPE not in said
    assert "Traceback" not in said
    assert len(said) < 5000


def test_an_error_without_a_text_is_an_error(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(toys.Curate, "run", returns(MuteError()))
        code, said = run(pipeline)
    assert code == 1
    assert "MuteError" in said
    assert run(pipeline)[0] == 0, "it goes on"


@pytest.mark.parametrize("value", [RuntimeError("boom"), MuteError(), None, ["text"], 3])
def test_preflight_may_return_anything(pipeline: Path, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(toys.Curate, "preflight", returns(value))
    loaded = load(pipeline, stage_type=toys.ToyStage)
    found = checking.check(loaded, runs=False)
    assert ["preflight of Curate" in str(error) for error in found.errors] == [True]
    assert "stages.curate" in str(found.errors[0])


@pytest.mark.parametrize("value", [RuntimeError("boom"), MuteError(), None, 3, [f"{ESCAPE} odd"]])
def test_drift_may_return_anything(
    write: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: Any
) -> None:
    file = write(
        "name: toy\nstore: runs/\ndata: {photos: {path: photos}}\nstages:\n"
        "  curate: {kind: curate, data: photos}\n  pretrain: {kind: pretrain, needs: curate}\n"
        f"  publish: {{kind: publish, needs: pretrain, outside: {tmp_path}/outside}}\n"
    )
    assert run(file)[0] == 0
    monkeypatch.setattr(toys.Publish, "drift", returns(value))
    code, said = run(file)
    assert code == 0, said
    assert "drift" in said or "odd" in said
    assert ESCAPE not in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.pretrain.optim=&a [*a, *a]", "an anchor contains itself"),
        (".".join(["a"] * 3000) + "=1", "nested deeper than"),
        ("stages.pretrain.\udcff=1", "not UTF-8"),
        ("stages.pretrain.ticks={a: 1, a: 2}", "written twice"),
    ],
)
def test_overrides_are_read_with_the_limits_of_files(pipeline: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(pipeline, [override], stage_type=toys.ToyStage)
    assert "command line" in str(caught.value)
    assert len(str(caught.value)) < 1000
