"""`plan --schedules`: every schedule is found, sampled where it bends, and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.schedules import Schedule
from orchestrator.errors import UserError
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.schedule_chart import draw, find, sample

RECIPE = Path(__file__).parents[2] / "conf" / "full_pipeline.yaml"


def test_every_schedule_of_the_recipe_is_found() -> None:
    stages = load(
        RECIPE, ["stages.distill.students.vit-pico.optimizer.lr.peak=0.001"], needs_data=False
    ).spec.stages
    names = {name: sorted(key for key, _ in find(stage)) for name, stage in stages.items()}
    rates = ["optimizer.lr", "optimizer.weight_decay"]
    assert names["gram"] == ["ema", "gram.weight", "local_weight", *rates, "teacher_temperature"]
    assert names["distill"] == ["ema", *rates, *(f"students.vit-pico.{name}" for name in rates)]
    assert names["curate"] == []


def test_a_sampled_schedule_has_its_ends_and_its_corner() -> None:
    schedule = Schedule(start=0.04, peak=0.07, warmup_steps=100_003)
    steps, values = sample(schedule, 1_000_000)
    assert steps[0] == 0
    assert steps[-1] == 999_999
    assert len(steps) < 500
    assert values == [schedule.at(int(step), 1_000_000) for step in steps]
    assert values[steps.index(100_003)] == 0.07
    assert values[steps.index(100_002)] < 0.07


def test_a_short_schedule_is_sampled_once_a_step() -> None:
    assert sample(Schedule(peak=1.0), 3) == ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])


@pytest.mark.heavy
def test_the_picture_is_drawn_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / "deep" / "schedules.png"
    result = CliRunner().invoke(app, ["plan", str(RECIPE), "--schedules", str(picture)])
    assert result.exit_code == 0, result.output
    assert "22 schedules" in result.output
    assert min(Image.open(picture).size) > 500


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a \.png file, not \.pdf"):
        draw(load(RECIPE, needs_data=False), tmp_path / "schedules.pdf")
    only = tmp_path / "only.yaml"
    only.write_text("name: a\ndata: {p: {path: .}}\nstages: {curate: {kind: curate, data: p}}\n")
    with pytest.raises(UserError, match="no stage of this pipeline has a schedule"):
        draw(load(only, []), tmp_path / "schedules.png")
