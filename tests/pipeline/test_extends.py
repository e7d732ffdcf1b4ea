"""A pipeline file over another: what is merged, what is replaced, and where a mistake is said to be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.config.yaml_source import read
from orchestrator.errors import UserError
from orchestrator.simulation.json_file import JsonFile

BASE = """\
name: base
seed: 1
stages:
  a: {kind: curate, ticks: 3, list: [1, 2, 3]}
  b:
    kind: pretrain
    needs: a
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(base: Path, text: str, name: str = "top.yaml") -> Path:
    path = base.with_name(name)
    path.write_text(text)
    return path


def test_mappings_are_merged_and_everything_else_is_replaced(base: Path) -> None:
    top = write(
        base,
        "extends: base.yaml\nname: top\nseed: null\nstages: {a: {ticks: 5, list: [9]}, c: {kind: publish}}\n",
    )
    data = read(top, ["stages.b.needs=c"]).data
    assert data == {
        "name": "top",
        "stages": {
            "a": {"kind": "curate", "ticks": 5, "list": [9]},
            "b": {"kind": "pretrain", "needs": "c"},
            "c": {"kind": "publish"},
        },
    }


def test_a_key_is_said_to_be_where_it_was_written(base: Path) -> None:
    top = write(base, "extends: base.yaml\nstages:\n  a:\n    list: [9]\n")
    document = read(top)
    assert document.where(("stages", "a", "ticks")) == f"{base}:4  stages.a.ticks = 3"
    assert document.where(("stages", "a", "list")) == f"{top}:4  stages.a.list = [9]"
    assert document.where(("stages", "b", "kind")) == f"{base}:6  stages.b.kind = pretrain"
    # The second entry of the list that was replaced is nowhere any more.
    assert (("stages", "a", "list", 1)) not in document.lines


def test_files_extend_in_a_chain(base: Path) -> None:
    write(base, "extends: base.yaml\nstages: {a: {ticks: 4}}\n", "middle.yaml")
    document = read(write(base, "extends: middle.yaml\nname: top\n"))
    assert document.data["name"] == "top"
    assert document.data["stages"]["a"]["ticks"] == 4
    assert document.where(("stages", "a", "ticks")).startswith(str(base.with_name("middle.yaml")) + ":2")
    assert document.where(("seed",)).startswith(f"{base}:2")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("extends: bas.yaml\n", "no such pipeline file"),
        ("extends: [base.yaml]\n", "not the path of a file"),
        ("extends: top.yaml\n", "the file extends itself"),
        ("extends: round.yaml\n", "the file extends itself"),
    ],
)
def test_what_cannot_be_extended_is_said(base: Path, text: str, wanted: str) -> None:
    write(base, "extends: top.yaml\n", "round.yaml")
    with pytest.raises(UserError, match=wanted) as caught:
        read(write(base, text))
    assert ".yaml:1  extends" in str(caught.value)


@pytest.mark.parametrize("opened", [read, lambda path: JsonFile(path, "trace")], ids=["plan", "simulate"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(
    tmp_path: Path, opened: Callable[[Path], object]
) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        opened(tmp_path / "pipe.yaml")


def test_a_pipe_that_is_extended_is_refused_by_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "top.yaml").write_text("extends: pipe.yaml\n")
    with pytest.raises(UserError, match="not a regular file"):
        read(tmp_path / "top.yaml")
