"""Every quantity of `conf/paper/` against the published one in `paper_values.csv`, every deviation against the docs.

A row of the table says which file and key (`*`, `?` and `[…]` match as in file names), what was published, where, and,
if our file has another value, under which name docs/paper-vs-code.md says so. `effective(raw, batch)` is
raw · 4 · √(batch / 1024), the rule that the published files scale their rates by. A quantity that was not published has
no value, and a name in the docs.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from orchestrator.pipeline.load import load
from orchestrator.stages.base import Stage, TrainStage
from orchestrator.stages.distill.config import Distill

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "conf" / "paper"
FILES = sorted(path.stem for path in PAPER.glob("*.yaml"))
# What a stage reads and how its batches are mixed is data, not the published numbers.
NO_QUANTITY = ("kind", "needs", "data", "student", "homogeneous", "homogeneous_ratio", "mix")


@dataclass(frozen=True)
class Row:
    file: str
    key: str
    published: str
    source: str
    deviation: str

    @property
    def value(self) -> Any:
        """What was published."""
        found = re.fullmatch(r"effective\((.+), (\d+)\)", self.published)
        if found:
            return float(found[1]) * 4 * (int(found[2]) / 1024) ** 0.5
        return yaml.safe_load(self.published)


def rows() -> list[Row]:
    with (Path(__file__).parent / "paper_values.csv").open(encoding="utf-8", newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def of_file(file: str) -> list[Row]:
    return [row for row in rows() if row.file == file]


@cache
def stages(file: str) -> dict[str, Stage]:
    """The training stages that a file itself describes."""
    loaded = load(PAPER / f"{file}.yaml", (), needs_data=False)
    own = yaml.safe_load(loaded.path.read_text())["stages"]
    return {name: stage for name, stage in loaded.spec.stages.items() if name in own and is_training(stage)}


def is_training(stage: Stage) -> bool:
    return isinstance(stage, TrainStage)


def leaves(value: Any, path: str, *, written: bool) -> Iterator[tuple[str, Any]]:
    """All values below `value` by path, or only those that the file writes out; without what is operational."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            extra = field.json_schema_extra
            operational = isinstance(extra, dict) and extra.get("operational")
            if operational or name in NO_QUANTITY or (written and name not in value.model_fields_set):
                continue
            yield from leaves(getattr(value, name), f"{path}.{name}", written=written)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}", written=written)
    elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}.{number}", written=written)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def quantities(file: str, *, written: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, stage in stages(file).items():
        if isinstance(stage, Distill) and not written:
            # What a student does not say is the stage's.
            students = {
                key: student.model_copy(
                    update={"optimizer": student.optimizer or stage.optimizer, "ema": stage.ema_of(student)}
                )
                for key, student in stage.students.items()
            }
            stage = stage.model_copy(update={"students": students})
        found |= dict(leaves(stage, f"stages.{name}", written=written))
    return found


def matching(row: Row) -> dict[str, Any]:
    return {key: value for key, value in quantities(row.file).items() if fnmatchcase(key, row.key)}


def equal(ours: Any, published: Any) -> bool:
    if isinstance(ours, bool) or isinstance(published, bool):
        return ours is published
    if isinstance(ours, (int, float)) and isinstance(published, (int, float)):
        return bool(ours == pytest.approx(published, rel=1e-4))
    return bool(ours == published)


def documented() -> set[str]:
    """The first cells of the tables in docs/paper-vs-code.md."""
    text = (ROOT / "docs" / "paper-vs-code.md").read_text(encoding="utf-8")
    return {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}


@pytest.mark.parametrize("file", FILES)
def test_every_quantity_of_a_file_has_a_published_value_or_a_reason(file: str) -> None:
    keys = [row.key for row in of_file(file)]
    without = [
        key for key in quantities(file, written=True) if not any(fnmatchcase(key, known) for known in keys)
    ]
    assert not without, "add them to tests/paper_values.csv"


@pytest.mark.parametrize("file", FILES)
def test_values_are_the_published_ones_or_the_docs_say_why_not(file: str) -> None:
    wrong = []
    for row in of_file(file):
        found = matching(row)
        assert found, f"{row.file}: {row.key} names nothing"
        if not row.published:
            continue
        for key, ours in found.items():
            if equal(ours, row.value) == bool(row.deviation):
                what = (
                    "is the published one, and listed as a deviation" if row.deviation else "is not published"
                )
                wrong.append(f"{key}: {ours!r} {what}; published: {row.value!r} ({row.source})")
    assert not wrong, "\n".join(wrong)


def test_every_deviation_is_in_the_docs_and_every_value_has_a_source() -> None:
    known = documented()
    for row in rows():
        assert row.file in FILES, row
        assert bool(row.published) == bool(row.source), row
        assert row.published or row.deviation, row
        assert not row.deviation or row.deviation in known, f"not in docs/paper-vs-code.md: {row.deviation}"


def test_a_rate_that_was_not_scaled_would_be_found() -> None:
    """The test tests: raw rates, other ramps and other decays are not published values."""
    (peak,) = [row for row in of_file("vitl_imagenet") if row.key.endswith("optimizer.lr.peak")]
    assert equal(5.6569e-3, peak.value)
    assert not equal(1e-3, peak.value)
    assert not equal(True, 1)
    assert not equal([0.9, 0.99], [0.9, 0.999])
