"""`init`: for unlike folders the file loads, and `plan` has no message; nothing is overwritten; the time adds up."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import command_line
from PIL import Image

from orchestrator.data.sources.survey import survey
from orchestrator.errors import UserError
from orchestrator.first_pipeline import machine_speed
from orchestrator.first_pipeline import proposal as first
from orchestrator.first_pipeline.machine_speed import Recipe, Sizes, Speed, Teacher, TrainingMachine, measure
from orchestrator.first_pipeline.proposal import FirstPipeline, first_pipeline, step_seconds
from orchestrator.models.presets import preset
from orchestrator.pipeline.check.pipeline_check import check
from orchestrator.pipeline.load import load

ROOT = Path(__file__).parents[2]
LAPTOP = TrainingMachine(2, 8.0)
SERVER = TrainingMachine(16, 128.0, (("H100", 79.6),))


def timed(machine: TrainingMachine, sizes: Sizes, chosen: Sequence[Teacher], recipe: Recipe) -> Speed:
    """A machine that is as fast every time."""
    students = dict.fromkeys(sizes.students, 0.01) if recipe == "distil" else {"pretrain": 0.08}
    return Speed(0.0, 0.03 * len(chosen), students)


def pictures(folder: Path, names: Sequence[str]) -> Path:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return folder


def labelled(folder: Path) -> Path:
    return pictures(
        folder, [f"{kind}/{number}.png" for kind in ("cat", "dog: big", "ñandú") for number in range(80)]
    )


def flat(folder: Path) -> Path:
    pictures(folder, [f"{number}.jpg" for number in range(220)])
    rows = [f"{number}.jpg,picture {number},{number % 3}" for number in range(220)]
    (folder / "captions.csv").write_text("\n".join(["file,caption,label", *rows]) + "\n")
    return folder


def tiny(folder: Path) -> Path:
    return pictures(folder, [f"{number}.bmp" for number in range(10)])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(first, "read_seconds", lambda survey, sizes: 0.002)


def chosen(
    folder: Path, recipe: Recipe = "distil", machine: TrainingMachine = LAPTOP, minutes: float | None = None
) -> FirstPipeline:
    return first_pipeline(
        survey(folder), Path("pipeline.yaml"), recipe, minutes, machine=machine, timed=timed
    )


@pytest.mark.parametrize("machine", [LAPTOP, SERVER], ids=["laptop", "server"])
@pytest.mark.parametrize("recipe", ["distil", "pretrain"])
@pytest.mark.parametrize("make", [labelled, flat, tiny])
def test_what_is_written_loads_and_plans(make: object, recipe: Recipe, machine: TrainingMachine) -> None:
    folder = Path("my pictures: 100 %")
    make(folder)  # type: ignore[operator]
    pipeline = chosen(folder, recipe, machine)
    pipeline.write()
    loaded = load("pipeline.yaml", needs_data=False, gather=True)
    found = check(loaded, runs=False)
    assert [str(error) for error in found.errors] == []
    # The only things that are not there are weights that a command fetches.
    assert all("weights/" in str(error) for error in loaded.missing)
    assert bool(loaded.missing) == (recipe == "distil")
    captions = loaded.spec.data["pictures"].captions
    counts = [fact for fact, _ in found.facts]
    if make is tiny:
        assert (captions, counts) == (None, [])
        assert "10 PICTURES ARE TOO FEW" in Path("pipeline.yaml").read_text()
    elif make is labelled:
        assert captions == Path("pipeline-labels.csv")
        assert counts == ["pictures: 0 of 240 photos have a caption, 240 a label"]
        with captions.open(newline="", encoding="utf-8") as file:
            assert {row["label"] for row in csv.DictReader(file)} == {"cat", "dog: big", "ñandú"}
    else:
        assert captions == folder / "captions.csv"
        assert counts == ["pictures: 220 of 220 photos have a caption, 220 a label"]
        assert "PICTURES ARE TOO FEW" not in Path("pipeline.yaml").read_text()
    assert max(map(len, Path("pipeline.yaml").read_text().splitlines())) <= 130


def test_a_gate_is_written_where_there_are_labels_to_decide_with() -> None:
    labelled(Path("cats"))
    tiny(Path("few"))
    stages = [yaml.safe_load(chosen(Path(name)).text())["stages"] for name in ("cats", "few")]
    assert [one["publish"].get("conditions") for one in stages] == [
        [{"beats": "raw_pixels"}, {"beats": "random_weights"}, "knn >= champion"],
        None,
    ]


def test_weights_that_are_there_leave_nothing_to_fetch() -> None:
    flat(Path("flat"))
    assert [line.split()[-4] for line in chosen(Path("flat")).next_commands() if "weights" in line]
    for teacher in machine_speed.teachers(machine_speed.SIZES["cpu"]):
        Path(teacher.folder).mkdir(parents=True)
        for name in (teacher.file, "config.json"):
            (Path(teacher.folder) / name).touch()
    pipeline = chosen(Path("flat"))
    assert pipeline.next_commands() == ["orchestrator plan pipeline.yaml", "orchestrator run pipeline.yaml"]


def test_without_transformers_its_teacher_is_a_comment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "find_spec", lambda name: None)
    flat(Path("flat"))
    pipeline = chosen(Path("flat"))
    pipeline.write()
    document = yaml.safe_load(Path("pipeline.yaml").read_text())
    assert list(document["stages"]["distill"]["features"]["teachers"]) == ["lite0"]
    assert "pip install transformers" in pipeline.text()
    assert not any("dinov2" in line for line in pipeline.next_commands())


def test_the_time_is_what_the_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 82 ms a picture on one core, of which two processes share two cores, and a third more."""
    flat(Path("flat"))
    monkeypatch.setattr(first, "find_spec", lambda name: object())
    pipeline = chosen(Path("flat"), minutes=20)
    assert pipeline.teacher_actors == 2
    assert step_seconds(pipeline) == pytest.approx(32 * 1.3 * 0.082 / 2)
    # Of 220 pictures in batches of 32, four views each are 28 steps. After them the teachers' 60 ms are saved.
    assert pipeline.repeat_after == 28
    assert step_seconds(pipeline, answered=True) == pytest.approx(32 * 1.3 * 0.022 / 2)
    seconds = 28 * 32 * 1.3 * 0.082 / 2 + (pipeline.steps - 28) * 32 * 1.3 * 0.022 / 2
    assert pipeline.minutes == pytest.approx(1.5 + seconds / 60)
    assert 17 < pipeline.minutes <= 20
    assert chosen(Path("flat"), minutes=10).steps < pipeline.steps
    # Nobody learns from the same picture a thousand times.
    assert chosen(Path("flat"), minutes=5000).views_of_each <= 400
    short = chosen(Path("flat"), minutes=2.5)
    assert (short.steps, short.repeat_after) == (54, 28)
    shortest = chosen(Path("flat"), minutes=2)
    assert (shortest.steps, shortest.repeat_after) == (50, None)


@pytest.mark.parametrize(
    ("count", "batch", "block"), [(8, 8, 4), (10, 8, 4), (31, 16, 8), (40, 32, 16), (300, 32, 16)]
)
def test_a_batch_fits_the_pictures(count: int, batch: int, block: int) -> None:
    pipeline = chosen(pictures(Path("some"), [f"{number}.png" for number in range(count)]))
    assert (pipeline.batch, pipeline.block) == (batch, block)
    assert batch <= count


def test_next_to_no_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="has 7 pictures: too few to train on"):
        chosen(pictures(Path("few"), [f"{number}.png" for number in range(7)]))


def test_nothing_is_overwritten() -> None:
    labelled(Path("cats"))
    Path("pipeline-labels.csv").write_text("mine")
    with pytest.raises(UserError, match=r"pipeline-labels\.csv exists already"):
        chosen(Path("cats")).write()
    assert not Path("pipeline.yaml").exists()
    Path("pipeline.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"pipeline\.yaml exists already") as raised:
        chosen(Path("cats"))
    assert "--out" in str(raised.value)
    assert Path("pipeline.yaml").read_text() == Path("pipeline-labels.csv").read_text() == "mine"


def test_a_folder_without_permission_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labelled(Path("cats"))
    # Root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path())
    with pytest.raises(UserError, match=r"^pipeline\.yaml cannot be written: no permission in /") as raised:
        chosen(Path("cats"))
    assert "--out" in str(raised.value)


@pytest.mark.parametrize("name", ["a\nstages: {}", "true", "#1", "été", "- x", "a: b", "2024", "*a", "'"])
def test_names_of_folders_stay_names(name: str) -> None:
    """Into a comment, a value and the pipeline's name."""
    flat(Path(name))
    chosen(Path(name)).write()
    document = yaml.safe_load(Path("pipeline.yaml").read_text())
    assert document["data"]["pictures"]["path"] == name
    assert sorted(document["stages"]) == ["curate", "distill", "evaluate", "publish"]
    load("pipeline.yaml", needs_data=False)


def test_students_of_a_laptop_have_the_rates_that_docs_headless_compares() -> None:
    flat(Path("cats"))
    chosen(Path("cats")).write()
    spec = load("pipeline.yaml", needs_data=False).spec.stages["distill"]
    vit, convnext = spec.students["vit"], spec.students["convnext"]
    assert vit.optimizer is None
    assert spec.optimizer.lr.peak == 2e-3
    assert convnext.optimizer == spec.optimizer.model_copy(
        update={"lr": spec.optimizer.lr.model_copy(update={"peak": 4e-3})}
    )


def test_sizes_are_multiples_of_patches() -> None:
    for sizes in machine_speed.SIZES.values():
        assert sizes.batch % sizes.block == 0
        assert sizes.focus_size % 14 == 0
        for model in (*sizes.students.values(), sizes.pretrained):
            assert sizes.size % preset(model).patch_size == sizes.local_size % preset(model).patch_size == 0


@pytest.mark.heavy
def test_models_are_measured_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "_WARM_S", 0.0)
    monkeypatch.setattr(machine_speed, "_TIMED_S", 0.0)
    sizes = machine_speed.SIZES["cpu"]
    found = measure(LAPTOP, sizes, machine_speed.teachers(sizes), "distil")
    assert found.teaching > 0
    assert sorted(found.learning) == ["convnext", "vit"]
    assert all(seconds > 0 for seconds in found.learning.values())
    assert list(measure(LAPTOP, sizes, (), "pretrain").learning) == ["pretrain"]


def test_the_command_tells_what_it_found_and_what_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first, "measure", timed)
    monkeypatch.setattr(first, "this_machine", lambda: LAPTOP)
    labelled(Path("cats"))
    Image.fromarray(np.full((20, 20), 999, np.uint16)).save("cats/cat/deep.png")
    code, said = command_line("init", "cats", toy=False)
    assert code == 0, said
    for part in ("241 in cats", "3 kinds, of 241 pictures", "2 cores", "no GPU", "1 of 200 have more than 8 bits",
                 "Wrote pipeline.yaml and pipeline-labels.csv", "orchestrator run pipeline.yaml"):  # fmt: skip
        assert part in said, said
    code, said = command_line("init", "cats", toy=False)
    assert code == 2
    assert "exists already" in said
    code, said = command_line("init", "dogs", "--out", "other.yaml", toy=False)
    assert code == 2
    assert "does not exist" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("path", sorted((ROOT / "conf/examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load_and_plan_without_their_data(path: Path) -> None:
    loaded = load(path, needs_data=False, gather=True)
    assert loaded.missing
    assert [str(error) for error in loaded.mistakes] == []
    assert [str(error) for error in check(loaded, runs=False).errors if error not in loaded.missing] == []


def test_twelve_bits_in_sixteen_get_their_range() -> None:
    folder = Path("scans")
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(120):
        Image.fromarray(rng.integers(0, 4096, (20, 24), dtype=np.uint16)).save(folder / f"{number}.png")
    chosen(folder).write()
    loaded = load("pipeline.yaml", needs_data=False, gather=True)
    pixels = loaded.spec.data["pictures"].pixels
    assert pixels is not None
    assert pixels.range == (0, 4095)
    assert "Their values do not go above 4095" in Path("pipeline.yaml").read_text()
