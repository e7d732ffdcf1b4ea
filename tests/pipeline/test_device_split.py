"""`orchestrator plan --devices`: what it prints, against the planner and sums done by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from orchestrator.capacity import measured_costs as profiles
from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.cli import app
from orchestrator.errors import UserError
from orchestrator.models import build, save_pretrained
from orchestrator.models.cost import forward_flops
from orchestrator.models.presets import preset
from orchestrator.pipeline.cost import device_split
from orchestrator.pipeline.cost.costing import costings
from orchestrator.pipeline.cost.device_split import print_splits, splits
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.stages.distill.profiling import Material, PartCosts

HEADLESS = """
name: headless
store: {folder}/runs
data: {{photos: {{path: {folder}/photos}}}}
{more}
stages:
  curate: {{kind: curate, data: photos}}
  distill:
    kind: distill
    needs: curate
    steps: 9
    batch_size: 8
    block_size: 4
    crops: {{global_size: 32, local_size: 16, num_local: 0}}
    optimizer: {{lr: {{peak: 0.001}}}}
    features: {{teachers: {{net: {{from: {folder}/net}}}}}}
    students: {{small: {{model: vit_femto, steps: 5}}}}
"""
ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "conf" / "full_pipeline.yaml"
FAMILY = ROOT / "conf" / "paper" / "dinov3_family.yaml"
COSTS = PartCosts(
    TeacherCost(1.0),
    (
        StudentCost("vit-nano", 2, 1.0, steps=22),
        StudentCost("vit-pico", 2, 0.5, steps=22),
        StudentCost("convnext-mini", 2, 0.5, steps=11),
    ),
    "measured on a core of a test, 2026-01-01 00:00 UTC",
    "cpu",
)


@pytest.fixture(autouse=True)
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Material, bool]]:
    """No measuring; what was to be measured."""
    asked: list[tuple[Material, bool]] = []

    def measured(material: Material, *, refresh: bool, say: object) -> PartCosts:
        asked.append((material, refresh))
        return COSTS

    monkeypatch.setattr(device_split, "measured", measured)
    monkeypatch.setattr(profiles, "cores", lambda: 2)
    return asked


def test_a_laptop_shares_its_cores(measuring: list[tuple[Material, bool]]) -> None:
    said = CliRunner().invoke(app, ["plan", str(LAPTOP), "--devices", "2"])
    assert said.exit_code == 0, said.output
    # 5 s of work on two cores without what is around it, and 4 s once the ConvNeXt has done its 11 steps.
    assert "2.688 s a step, η 0.930; processes share the cores" in said.output
    assert "then, for 11 steps: teacher 1, vit-nano 1, vit-pico 1; 2.151 s a step" in said.output
    assert "measured on a core of a test" in said.output
    (asked,) = measuring
    assert asked[0].recipe.model == "vit_nano", "the backbone where the lineage began"
    assert not asked[1]


def test_without_a_terminal_each_measurement_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(material: Material, *, refresh: bool, say: Callable[[str], None]) -> PartCosts:
        say("measuring the teacher: about a minute")
        return COSTS

    monkeypatch.setattr(device_split, "measured", measured)
    said = CliRunner().invoke(app, ["plan", str(LAPTOP), "--devices", "2", "--json"])
    assert said.stderr == "distill: measuring the teacher: about a minute\n"
    json.loads(said.stdout)


def test_more_cores_than_parts_are_given_out(measuring: list[tuple[Material, bool]]) -> None:
    said = CliRunner().invoke(app, ["plan", str(LAPTOP), "--devices", "6", "--json", "--refresh"])
    (stage,) = json.loads(said.stdout)["stages"]
    first, second = stage["phases"]
    assert first["workers"] == {"vit-nano": 2, "vit-pico": 1, "convnext-mini": 1}
    assert (first["teachers"], first["step_s"], first["leftover"], first["shared"]) == (1, 1.0, 1, False)
    assert first["eta"] == pytest.approx(5 / 6)
    assert (first["steps"], second["steps"]) == (11, 11)
    assert stage["device_hours"] == pytest.approx((11 * 5 + 11 * 4) / 3600)
    assert stage["device_hours_separate"] == pytest.approx((22 * 3 + 22 * 2 + 11 * 2) / 3600)
    assert measuring[0][1], "--refresh"


def test_too_few_devices_say_how_many_are_needed() -> None:
    loaded = load(LAPTOP, [], needs_data=False)
    with pytest.raises(UserError, match=r"3 devices are too few.*at least 4") as caught:
        splits(loaded, 3, refresh=False, say=print)
    assert "full_pipeline.yaml" in (caught.value.where or "")


def test_other_machines_are_estimated(measuring: list[tuple[Material, bool]]) -> None:
    """The family on 256 H100: a step is the bound or a little more, and its parts' operations are `plan`'s."""
    loaded = load(FAMILY, ["stages.distill.chunk_rows=4096"], needs_data=False)
    (found,) = splits(loaded, 256, refresh=False, say=print)
    assert not measuring
    split = found.phases[0].split
    assert split.teachers + sum(split.workers.values()) <= 256
    # 7.1 TFLOP an image and 4096 images (docs/paper-scale.md), at 0.4 of 989 TFLOP/s.
    assert found.costs.teacher.step_s == pytest.approx(4096 * 7.12e12 / (0.4 * 989e12), rel=0.01)
    assert 0.9 < split.eta <= 1
    assert split.workers["vit-h-plus"] > split.workers["vit-l"] > split.workers["vit-b"]
    assert found.hours < 0.5 * found.separate, "nine students share one teacher"
    assert "nothing was measured" in found.costs.source
    assert {name for name in split.workers if name.startswith("convnext")} == {
        "convnext-t", "convnext-s", "convnext-b", "convnext-l"
    }  # fmt: skip


def test_the_table_fits_a_terminal_of_a_hundred_columns() -> None:
    loaded = load(FAMILY, ["stages.distill.chunk_rows=4096"], needs_data=False)
    console = Console(width=100, record=True, file=io.StringIO())
    print_splits(console, splits(loaded, 256, refresh=False, say=print))
    tables = [
        line for line in console.export_text().splitlines() if line.startswith(("part", "teacher", "vit"))
    ]
    assert len(tables) >= 6
    assert all(len(line) < 100 for line in tables)


def test_a_file_without_distillation_is_refused() -> None:
    loaded = load(ROOT / "conf" / "paper" / "dinov3_7b.yaml", [], needs_data=False)
    with pytest.raises(UserError, match="no stage of this pipeline distils"):
        splits(loaded, 256, refresh=False, say=print)


def test_without_devices_nothing_is_measured(
    measuring: list[tuple[Material, bool]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["plan", str(FAMILY)])
    assert said.exit_code == 0, said.output
    assert "s a step" not in said.output
    assert not measuring


def headless(tmp_path: Path, more: str = "") -> LoadedPipeline:
    save_pretrained(tmp_path / "net", build("vit_femto").state_dict(), "vit_femto")
    file = tmp_path / "headless.yaml"
    file.write_text(HEADLESS.format(folder=tmp_path, more=more))
    return load(file, [], needs_data=False)


def test_a_teacher_from_elsewhere_is_measured(measuring: list[tuple[Material, bool]], tmp_path: Path) -> None:
    (split,) = splits(headless(tmp_path), 2, refresh=False, say=print)
    assert split.phases[0].split.step_s > 0
    assert [asked.recipe for asked, _ in measuring] == [None]


def test_what_a_teacher_from_elsewhere_costs_is_not_made_up(tmp_path: Path) -> None:
    loaded = headless(tmp_path, "hardware: {devices: 8}")
    with pytest.raises(UserError, match="cannot be estimated") as caught:
        splits(loaded, 8, refresh=False, say=print)
    assert "headless.yaml:" in (caught.value.where or "")
    # Its student's are: forward and backward, of two views.
    assert loaded.spec.hardware is not None
    (student,) = costings(loaded, loaded.spec.hardware)
    assert student.work.name == "distill/small"
    assert student.work.flops_per_image == pytest.approx(3 * 2 * forward_flops(preset("vit_femto"), 32, 32))
    assert student.work.steps == 5
