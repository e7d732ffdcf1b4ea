"""What is known before the first step: each message by itself, all at once, and none about a good file."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.errors import UserError
from orchestrator.pipeline.check.pipeline_check import check
from orchestrator.pipeline.load import load
from orchestrator.pipeline.plan.stage_plan import Choice

from .checking import PHOTOS, PIPELINE, checked, line_of, told


@pytest.mark.parametrize("runs", [True, False])
def test_a_good_file_has_no_message(folder: Path, runs: bool) -> None:
    found = checked(runs=runs)
    assert (told(found.errors), told(found.warnings)) == ("", "")
    assert [stage.name for stage in found.stages] == list(PIPELINE["stages"])  # type: ignore[call-overload]
    assert found.facts == [("photos: 12 of 12 photos have a caption, 0 a label", True)]
    assert sorted(path.name for path in folder.iterdir()) == ["captions.csv", "photos", "pipeline.yaml"]


def test_a_mistake_in_a_stage_that_is_left_out_is_a_warning(folder: Path) -> None:
    loaded = load("pipeline.yaml", ["stages.gram.gram.teacher=17"], needs_data=False, gather=True)
    until = check(loaded, runs=True, choice=Choice(last="pretrain"))
    assert told(until.errors) == ""
    assert "no snapshot after 17" in told(until.warnings)
    assert "no snapshot after 17" in told(check(loaded, runs=True, choice=Choice(last="gram")).errors)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("evaluate.needs=[curate]", ["no backbone to evaluate", "stages.evaluate.needs", "kind pretrain"]),
        (
            "evaluate.image_size=33",
            ["patch size of vit_femto, 8 pixels", "33 pixels", "evaluate.image_size = 33", "use 32"],
        ),
        ("align.student=smal", ["no student 'smal'", "stages.align.student = smal", "student: small"]),
        ("align.student=null", ["there is more than one", "stages.align", "small, tiny"]),
        ("align.needs=[curate, gram]", ["not distilled into students", "stages.align.student", "leave out"]),
        ("align.image_size=33", ["image_size 33", "patch size 8", "stages.align.image_size = 33", "use 32"]),
        ("align.batch_size=14", ["14 pairs", "12 photos", "stages.align.batch_size = 14", "at most 12"]),
        ("publish.names=[smal, tiny]", ["no student 'smal'", "stages.publish.names", "'small'"]),
        ("gram.gram.teacher=17", ["no snapshot after 17", "stages.gram.gram.teacher = 17", "8, 16, 20"]),
        ("curate.clusters=13", ["13 clusters", "12 photos", "stages.curate.clusters = 13", "at most 12"]),
        ("curate.sample=13", ["sample of 13", "12 photos", "stages.curate.sample = 13", "at most 12"]),
        ("distill.needs=[curate, grm]", ["needs 'grm'", "stages.distill.needs = [curate, grm]", "'gram'"]),
        ("pretrain.elastic={ray_train_callbacks: [no_such:Callback]}",
         ["'no_such:Callback'", "no module no_such", "stages.pretrain.elastic.ray_train_callbacks"]),
        ("pretrain.elastic={ray_train_callbacks: [json:Callback]}", ["json has no Callback"]),
        ("pretrain.elastic={ray_train_callbacks: [json]}", ["no colon", "package.module:Class"]),
    ],
)  # fmt: skip
def test_what_would_end_a_stage_is_told_before(folder: Path, override: str, parts: list[str]) -> None:
    said = told(checked(f"stages.{override}").errors)
    assert not [part for part in parts if part not in said], said


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("file,caption\nx/00.jpeg,a\n", ["none of the names", "captions.csv:2", "did you mean '00.jpg'"]),
        ("fil,caption\n00.jpg,a\n", ["no `file` column", "captions.csv", "'fil'"]),
        (
            "file,label\n00.jpg,a\n",
            ["none of the 12 photos has a caption", "stages.align.needs", "curate stage"],
        ),
        (
            "file,caption\n00.jpg,a\n01.jpg,b\n",
            ["4 pairs", "2 photos", "stages.align.batch_size", "at most 2"],
        ),
    ],
    ids=["names", "column", "no caption", "few captions"],
)
def test_captions_are_read_before(folder: Path, text: str, parts: list[str]) -> None:
    (folder / "captions.csv").write_text(text)
    said = told(checked().errors)
    assert not [part for part in parts if part not in said], said


def test_half_of_the_captions_are_counted(folder: Path) -> None:
    rows = "".join(f"{number:02}.jpg,x,y\n" for number in range(8))
    (folder / "captions.csv").write_text("file,caption,label\n" + rows + "00.jpg,other,y\n")
    found = checked()
    assert found.errors == []
    assert found.facts == [("photos: 8 of 12 photos have a caption, 8 a label", False)]
    assert "1 photo has different rows" in told(found.warnings)


def test_all_messages_come_at_once(folder: Path) -> None:
    (folder / "captions.csv").write_text("file,caption\nnone.jpg,a\n")
    found = checked(
        "stages.publish.names=[smal]",
        "stages.align.student=tin",
        "stages.curate.clusters=100",
        "stages.gram.gram.teacher=17",
        "store=pipeline.yaml",
    )
    with pytest.raises(UserError) as caught:
        found.raise_if_any()
    said = str(caught.value)
    parts = ["none of the names", "'smal'", "'tin'", "100 clusters", "after 17", "pipeline.yaml is a file"]
    assert not [part for part in parts if part not in said], said
    assert said.count("  at   ") == len(parts)


def test_lines_are_those_of_the_file(folder: Path) -> None:
    text = Path("pipeline.yaml").read_text()
    Path("pipeline.yaml").write_text(text.replace("student: small", "student: smal"))
    assert f"pipeline.yaml:{line_of('student: smal')}  stages.align.student" in told(checked().errors)


def test_of_missing_data_the_rest_is_told_too(folder: Path) -> None:
    shutil.rmtree(folder / "photos")
    said = told(checked("stages.publish.names=[smal]").errors)
    assert "no such folder: photos" in said
    assert "'smal'" in said
    assert "no such folder" not in told(checked(runs=False).errors), "a plan needs no data"
    planned = told(checked("stages.publish.names=[smal]", runs=False).errors)
    assert "'smal'" in planned
    assert "no such folder: photos" in planned, "beside a mistake, all is told at once"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "stages.pretrain.batch_size=5",
            ["batch_size 5 is not a multiple of block_size 2", "stages.pretrain.batch_size = 5",
             "use batch_size 4 or 6, or block_size 1"],
        ),
        (
            "stages.pretrain.crops.global_size=50",
            ["crops.global_size 50 is not a multiple of vit_femto's patch size",
             "stages.pretrain.crops.global_size = 50", "hint use 48"],
        ),
        (
            "stages.gram.crops.global_size=50",
            ["global_size 50 is not a multiple of", "stages.gram.crops.global_size = 50", "hint use 48"],
        ),
        (
            "stages.distill.students.small={model: vit_femto, views: {global_size: 50}}",
            ["global_size 50 is not a multiple of", "students.small.views.global_size = 50", "hint use 48"],
        ),
        ("stages.pretrain.optimizer.lr=1e-3", ["stages.pretrain.optimizer.lr = 1e-3", "write `lr: {peak: 1e-3}`"]),
        ("stages.pretrain.optimizer.lr=0.5", ["write `lr: {peak: 0.5}`"]),
    ],
)  # fmt: skip
def test_a_mistake_names_its_key_and_what_fits(folder: Path, override: str, expected: list[str]) -> None:
    said = CliRunner().invoke(app, ["plan", "pipeline.yaml", override])
    text = " ".join(str(said.exception or said.output).split())
    for part in expected:
        assert part in text


def test_a_default_that_does_not_fit_is_called_one(folder: Path) -> None:
    pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
    pipeline["stages"]["pretrain"] |= {"batch_size": 30}
    del pipeline["stages"]["pretrain"]["block_size"]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    with pytest.raises(UserError) as caught:
        checked()
    assert "batch_size 30 is not a multiple of block_size 16, which is the default" in str(caught.value)
    assert caught.value.hint == "use batch_size 16 or 32, or block_size 15"
    assert "stages.pretrain.batch_size = 30" in str(caught.value.where)


def test_a_plan_names_the_nearest_folder_of_missing_data(folder: Path) -> None:
    (folder / "photos").rename(folder / "photo")
    said = CliRunner().invoke(app, ["plan", "pipeline.yaml"]).output
    assert "! no such folder: photos" in said
    assert "hint did you mean photo?" in said
    assert "Which stages would run is known once nothing is missing." in said


def test_of_missing_captions_nothing_is_said_but_that_they_are_missing(folder: Path) -> None:
    (folder / "captions.csv").unlink()
    said = told(checked().errors)
    assert "captions.csv" in said
    assert said.count("  at   ") == 1, "what the photos would have is not known"
    planned = CliRunner().invoke(app, ["plan", "pipeline.yaml"])
    assert (planned.exit_code, "has a caption" in planned.output) == (0, False), planned.output
    assert "captions.csv" in planned.output


def test_captions_in_shards_are_counted(folder: Path) -> None:
    """Else a stage that needs them is refused, though they are there."""
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "a.tar", "w") as tar:
        for number in range(PHOTOS):
            tar.add(folder / "photos" / f"{number:02}.jpg", f"{number:02}.jpg")
            (folder / "text").write_text(f"dish {number}")
            tar.add(folder / "text", f"{number:02}.txt")
    found = checked("data.photos={path: tars, shards: tar}")
    assert told(found.errors) == ""
    assert found.facts == [("photos: 12 of 12 photos have a caption, 0 a label", True)]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ("00.jpg\n../x.jpg\n", ["names '../x.jpg'", "  at   m.csv:3"]),
        (
            "sub/00.jpg\n",
            ["no images in photos", "1 × does not exist", "data.photos.manifest", "from the dataset's"],
        ),
    ],
)
def test_a_mistake_in_a_manifest_is_where_it_is(folder: Path, rows: str, parts: list[str]) -> None:
    (folder / "m.csv").write_text("path\n" + rows)
    said = told(checked("data.photos={path: photos, manifest: m.csv}").errors)
    assert not [part for part in parts if part not in said], said
    (folder / "m.csv").unlink()
    said = told(checked("data.photos={path: photos, manifest: m.csv}").errors)
    assert said.count("  at   ") == 1, said


def test_what_a_manifest_says_of_files_that_are_gone_is_not_counted(folder: Path) -> None:
    rows = "".join(f"{number:02}.jpg,dish\n" for number in range(PHOTOS + 1))
    (folder / "m.csv").write_text("path,caption\n" + rows)
    found = checked("data.photos={path: photos, manifest: m.csv}")
    assert found.facts == [("photos: 12 of 12 photos have a caption, 0 a label", True)]


@pytest.mark.parametrize(
    ("data", "hint"),
    [("", "set `shards: tar`"), (", shards: parquet", "set `shards: tar`"), (", shards: tar", None)],
)
def test_a_folder_of_shards_is_known_for_one(folder: Path, data: str, hint: str | None) -> None:
    (folder / "tars").mkdir()
    if hint:
        (folder / "tars" / "a.tar").touch()
    said = told(checked(f"data.photos={{path: tars{data}}}").errors)
    assert (hint or "images are in files that end in .tar") in said


# --- the command line -------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_command_refuses_with_all_of_it_and_starts_nothing(folder: Path, command: str) -> None:
    overrides = ["stages.publish.names=[smal]", "stages.align.student=tin", "stages.curate.clusters=100"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", command, "pipeline.yaml", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert all(part in said for part in ("'smal'", "'tin'", "100 clusters")), said
    assert "Traceback" not in said
    assert "starting Ray" not in said
    assert sorted(path.name for path in folder.iterdir()) == ["captions.csv", "photos", "pipeline.yaml"]


def test_a_plan_prints_what_it_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:

    caplog.set_level(logging.ERROR)
    said = CliRunner().invoke(app, ["plan", "pipeline.yaml"]).output
    assert "photos: 12 of 12 photos have a caption" in said
    assert "7 of 7 stages to run" in said
