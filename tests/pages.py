"""The pages of the documentation, and the command lines in them, for tests that hold them to the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from orchestrator.config.schema import Pipeline
from orchestrator.reference.page import sections
from orchestrator.stages import AnyStage
from orchestrator.stages.registry import kind_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
# What is superseded speaks of files that are gone, on purpose.
LIVING = [page for page in PAGES if page.name != "0003-elastic-job.md"]
# What the command line itself prints.
GENERATED = ROOT / "docs" / "commands.md"
SAMPLE = "conf/full_pipeline.yaml"


def _keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def keys() -> dict[str, set[str]]:
    """The keys of every section, by what the reference calls it: a stage by its kind, the file as `pipeline`."""
    found = {"pipeline": _keys(Pipeline[AnyStage])}
    found |= {kind_of(stage): _keys(stage) for stage in get_args(get_args(AnyStage)[0])}
    return found | {model.__name__: _keys(model) for model in sections()}


KEYS = keys()
ALL_KEYS = set().union(*KEYS.values())


def each_page(pages: list[Path] = PAGES) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path, start: str) -> list[list[str]]:
    """The command lines of a page that begin so, in its blocks and in its prose, a part of one too."""
    return typed(page, start) + [
        split(line) for line in sorted({*re.findall(rf"`({start}[^`\n]*)`", joined(page))})
    ]


def typed(page: Path, start: str) -> list[list[str]]:
    """The command lines of a page's blocks that begin so: indented, after a prompt, or in a block for a shell."""
    text = joined(page)
    shell = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, flags=re.S | re.M)
    lines = re.findall(rf"^(?: {{4,}}|\S*\$ +)(?:.*-- +)?(?:\S*/)?({start}.*)$", text, flags=re.M)
    for block in shell:
        lines += re.findall(rf"^(?:\S*/)?({start}.*)$", block, flags=re.M)
    return [split(line) for line in dict.fromkeys(lines)]


def joined(page: Path) -> str:
    """A page with continued lines as one."""
    return page.read_text().replace("\\\n", " ")


def split(line: str) -> list[str]:
    """The words of a command line, without comment, redirection and what stands for more."""
    line = line.partition(" #")[0].partition(" > ")[0].partition("`")[0]
    return [word for word in shlex.split(line.replace("'", "")) if word not in ("…", "\\")]


HAND_WRITTEN = [page for page in LIVING if page != GENERATED]
