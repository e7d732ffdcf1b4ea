"""What is known before the first step: each complaint by itself, all at once, and none about a good file."""

from __future__ import annotations

import http.server
import logging
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster, file_visibility
from orchestrator.errors import UserError
from orchestrator.pipeline.check import probes
from orchestrator.pipeline.check.pipeline_check import Checked, check, check_cluster
from orchestrator.pipeline.cost import memory_and_disk
from orchestrator.pipeline.load import LoadedPipeline, load
from orchestrator.pipeline.plan.stage_plan import EVERYTHING, Choice
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.storage.open import open_store
from orchestrator.tracking import reachable

PHOTOS = 12
TRAINING = {
    "steps": 20, "batch_size": 4, "block_size": 2,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 0.001}},
}  # fmt: skip
PIPELINE = {
    "name": "known",
    "elastic": {"workers": 1},
    "data": {"photos": {"path": "photos", "captions": "captions.csv"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 2},
        "pretrain": {"kind": "pretrain", "needs": "curate", "model": "vit_femto", "snapshot_every": 8, **TRAINING},
        "gram": {"kind": "gram_anchor", "needs": ["curate", "pretrain"], "gram": {"teacher": 16}, **TRAINING},
        "distill": {
            "kind": "distill", "needs": ["curate", "gram"], **TRAINING,
            "students": {"small": {"model": "vit_femto"}, "tiny": {"model": "vit_femto"}},
        },
        "align": {"kind": "align_text", "needs": ["curate", "distill"], "student": "small", "steps": 2,
                  "batch_size": 4, "block_size": 2},
        "evaluate": {"kind": "evaluate", "needs": ["curate", "gram", "distill", "align"]},
        "publish": {"kind": "publish", "needs": ["distill", "evaluate"], "names": ["small"]},
    },
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with photos, all with a caption, and a pipeline, on a machine with room for it."""
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch)
    (tmp_path / "photos").mkdir()
    for number in range(PHOTOS):
        (tmp_path / "photos" / f"{number:02}.jpg").write_bytes(b"%d" % number)
    rows = [f"{number:02}.jpg,dish {number}" for number in range(PHOTOS)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    return tmp_path


def checked(*overrides: str, runs: bool = True, choice: Choice = EVERYTHING) -> Checked:
    return check(load("pipeline.yaml", overrides, needs_data=False, gather=True), runs=runs, choice=choice)


def told(errors: list[UserError]) -> str:
    return "\n".join(str(error) for error in errors)


def line_of(text: str) -> int:
    """The line of the pipeline file that has a text."""
    lines = Path("pipeline.yaml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@pytest.mark.parametrize("runs", [True, False])
def test_a_good_file_has_no_complaint(folder: Path, runs: bool) -> None:
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


def test_all_complaints_come_at_once(folder: Path) -> None:
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
    assert "Which stages would run is known once that exists." in said


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


# --- disk and memory --------------------------------------------------------------------------------------------


def machine(monkeypatch: pytest.MonkeyPatch, *, disk: float = 1e12, memory: float = 1e12) -> None:
    monkeypatch.setattr(memory_and_disk, "_free_disk", lambda folder: int(disk))
    monkeypatch.setattr(memory_and_disk, "_free_memory", lambda: int(memory))
    monkeypatch.setattr(memory_and_disk, "_SHARED", Path("/"))


def test_a_store_that_is_too_small_for_artifacts_is_an_error_and_a_tight_one_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("pipeline.yaml")
    needs = memory_and_disk.needs(loaded, list(loaded.spec.stages))
    kept = sum(need.artifact for need in needs)
    whole = kept + max(need.work for need in needs)
    machine(monkeypatch, disk=0.99 * kept)
    said = told(checked().errors)
    assert "the stages to run leave about" in said
    assert "the store runs has" in said
    assert 1.01 * kept < 0.95 * whole
    for free in (1.01 * kept, 0.95 * whole, 1.1 * whole):
        machine(monkeypatch, disk=free)
        found = checked()
        assert found.errors == [], "the figures are on the safe side"
        assert "the stages to run take about" in told(found.warnings)
        assert "of the disk" in told(found.warnings)
    machine(monkeypatch, disk=1.3 * whole)
    assert checked().warnings == []


def test_what_an_earlier_attempt_left_is_not_counted_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("pipeline.yaml")
    needs = memory_and_disk.needs(loaded, list(loaded.spec.stages))
    whole = sum(need.artifact for need in needs) + max(need.work for need in needs)
    machine(monkeypatch, disk=0.9 * whole)
    assert "of the disk" in told(checked().warnings)
    stage = next(stage for stage in checked().stages if stage.name == "distill")
    workspace = Workspace("runs")
    piece = workspace.work("student", "ab" * 32)
    piece.mkdir(parents=True)
    workspace.note_piece("distill", stage.key, "small", "student", "ab" * 32)
    with (piece / "shard").open("wb") as file:
        file.truncate(int(0.5 * whole))
    assert checked().warnings == []


@pytest.mark.parametrize(
    ("choice", "stages"),
    [
        (EVERYTHING, []),
        (Choice(force=("curate",)), ["pretrain", "gram", "distill", "align"]),
        (Choice(force=("gram",)), ["gram", "distill", "align"]),
        (Choice(on_code=True), ["pretrain", "gram", "distill", "align"]),
    ],
    ids=["all there", "force", "force in the middle", "other code"],
)
def test_what_is_made_anew_takes_room_and_needs_the_cluster(
    folder: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, choice: Choice, stages: list[str]
) -> None:
    made = SimpleNamespace(digest="d", provenance={"versions": {"torch": "another"}})
    monkeypatch.setattr(Workspace, "find", lambda *_: SimpleNamespace(manifest=made))
    measured: list[str] = []

    def needs(loaded: LoadedPipeline, names: Sequence[str]) -> list[memory_and_disk.Need]:
        measured.extend(names)
        return []

    monkeypatch.setattr(memory_and_disk, "needs", needs)
    said = told(checked(f"cluster.address=127.0.0.1:{closed_port}", choice=choice).errors)
    assert [name for name in measured if name not in ("curate", "evaluate", "publish")] == stages
    assert ("no Ray cluster answers" in said) == bool(stages)


def test_what_is_predicted_is_what_a_run_leaves() -> None:
    """The artifacts of the laptop's pipeline had 49.3 and 74.6 MB (three students, with their stage) in a store."""
    conf = Path(__file__).parents[2] / "conf" / "full_pipeline.yaml"
    loaded = load(conf, needs_data=False)
    pretrain, distill = memory_and_disk.needs(loaded, ["pretrain", "distill"])
    assert pretrain.artifact == pytest.approx(49.3e6, rel=0.15)
    assert distill.artifact == pytest.approx(74.6e6, rel=0.15)
    assert pretrain.work > 3 * 25.4e6, "two checkpoints are kept, and one is written"


def test_a_kind_says_what_it_takes_beside_its_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("pipeline.yaml")
    (plain,) = memory_and_disk.needs(loaded, ["pretrain"])
    monkeypatch.setattr(Pretrain, "kept_bytes", lambda stage, origin: 7.0)
    monkeypatch.setattr(Pretrain, "held_bytes", lambda stage: 5.0)
    (found,) = memory_and_disk.needs(loaded, ["pretrain"])
    assert (found.artifact - plain.artifact, found.shared) == (7.0, 5.0)
    taught, kept = (
        memory_and_disk.needs(load("pipeline.yaml", [f"stages.distill.replay={one}"]), ["distill"])[0]
        for one in ("false", "true")
    )
    # 20 steps of 4 photos with two crops: a number of 4 bytes for each of the DINO head's 64, and more for iBOT's.
    assert kept.artifact - taught.artifact > 20 * 4 * 2 * 64 * 4


def test_more_memory_than_there_is_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, memory=2**28)
    found = checked("elastic.device=cpu")
    assert found.errors == []
    assert "stage 'distill' takes about" in told(found.warnings)
    assert "this machine has 0.2 GiB" in told(found.warnings)


def test_a_joined_cluster_is_compared_with_what_ray_counts(folder: Path) -> None:
    loaded = load("pipeline.yaml")
    needs = memory_and_disk.needs(loaded, ["distill"])
    little = list(memory_and_disk.of_cluster(loaded, needs, {"memory": 2**28, "object_store_memory": 1.0}))
    assert ["of memory" in str(little[0]), "object store of the cluster" in str(little[1])] == [True, True]
    assert (
        list(memory_and_disk.of_cluster(loaded, needs, {"memory": 2**40, "object_store_memory": 2**40})) == []
    )
    with_gpus = {"memory": 2**28, "object_store_memory": 2**40, "GPU": 8.0}
    assert list(memory_and_disk.of_cluster(loaded, needs, with_gpus)) == [], (
        "networks are in the GPUs' memory"
    )


# --- who has to answer ------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("runs", [True, False])
def test_a_tracking_server_that_is_away_stops_nothing_and_is_told_at_once(
    folder: Path, closed_port: int, runs: bool
) -> None:
    found = checked(f"tracking.uri=http://127.0.0.1:{closed_port}", runs=runs)
    assert found.errors == []
    assert "does not answer" in told(found.warnings)
    assert "tracking.uri" in told(found.warnings)
    assert "publish cannot run without the model registry" in told(found.warnings)


def test_a_tracking_server_that_hangs_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_ANSWER_S", 0.2)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        found = checked(f"tracking.uri=http://127.0.0.1:{one.getsockname()[1]}")
    assert "answer" in told(found.warnings)


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refuses) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


def test_any_answer_of_a_tracking_server_will_do(folder: Path, server: str) -> None:
    assert checked(f"tracking.uri={server}").warnings == []


def test_a_database_that_is_none(folder: Path) -> None:
    (folder / "m.db").write_text("no database at all")
    assert "is not an SQLite database" in told(checked("tracking.uri=sqlite:///m.db").warnings)
    (folder / "d.db").mkdir()
    assert "is a folder" in told(checked("tracking.uri=sqlite:///d.db").warnings)


def test_a_database_without_its_driver() -> None:
    trouble = reachable.trouble("postgresql+nodriver://host/mlflow", 1.0)
    assert "driver nodriver is not installed" in str(trouble)


def test_a_cluster_that_is_away(folder: Path, closed_port: int) -> None:
    override = f"cluster.address=127.0.0.1:{closed_port}"
    assert "no Ray cluster answers" in told(checked(override).errors)
    plan = checked(override, runs=False)
    assert plan.errors == []
    assert "no Ray cluster answers" in told(plan.warnings)


def test_a_remote_store_that_is_away(folder: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    said = told(checked("store=s3://bucket/prefix", "stages.publish.names=[smal]").errors)
    assert "does not answer" in said
    assert "'smal'" in said


def test_a_remote_store_is_written_to_and_left_as_it_was(folder: Path, s3_uri: str) -> None:
    found = checked(f"store={s3_uri}")
    assert (told(found.errors), told(found.warnings)) == ("", "")
    assert list(open_store(s3_uri).list()) == []


# --- a cluster that was joined ----------------------------------------------------------------------------------


def looked_at(
    monkeypatch: pytest.MonkeyPatch, machines: dict[str, str], sees: dict[str, list[str]]
) -> tuple[Checked, dict[str, int]]:
    """What is found at a cluster with such machines, and the files that they were asked for."""
    import ray

    asked: dict[str, int] = {}

    def unseen(files: dict[str, int], nodes: dict[str, str]) -> dict[str, list[str]]:
        asked.update(files)
        return {host: [name for name in files if name not in sees[host]] for host in nodes.values()}

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 2**40, "object_store_memory": 2**40})
    monkeypatch.setattr(file_visibility, "other_machines", lambda: machines)
    monkeypatch.setattr(file_visibility, "unseen", unseen)
    loaded = load("pipeline.yaml")
    Path("runs/pipelines/known").mkdir(parents=True)
    Path("runs/pipelines/known/pipeline.yaml").write_text("a record")
    return check_cluster(loaded, ["pretrain", "gram"], Workspace("runs")), asked


def test_machines_that_see_no_photos_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = looked_at(monkeypatch, {"n": "10.0.0.7"}, {"10.0.0.7": []})
    assert [Path(name).name for name in asked] == ["00.jpg", "06.jpg", "11.jpg", "pipeline.yaml"]
    said = told(found.errors)
    assert "1 of the cluster's 1 other machines cannot read" in said
    assert all(part in said for part in ("00.jpg: 10.0.0.7", "data.photos.path", "  store"))
    assert found.warnings == []


def test_two_nodes_on_one_machine_are_one_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = looked_at(monkeypatch, {"m": "10.0.0.7", "n": "10.0.0.7"}, {"10.0.0.7": []})
    assert found.warnings == [], "no machine is left that could work"
    assert told(found.errors).count("1 of the cluster's 1 other machines cannot read") == 2
    assert len(found.errors) == 2


def test_some_machines_that_see_no_photos_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = [
        str(path) for path in (*folder.rglob("*.jpg"), folder / "runs/pipelines/known/pipeline.yaml")
    ]
    sees = {"10.0.0.7": [], "10.0.0.8": everything}
    found, _ = looked_at(monkeypatch, {"m": "10.0.0.7", "n": "10.0.0.8"}, sees)
    assert found.errors == []
    assert told(found.warnings).count("1 of the cluster's 2 other machines cannot read") == 2


def test_a_file_of_another_size_is_not_the_same(folder: Path) -> None:
    files = file_visibility.samples(folder / "photos", ["00.jpg", "01.jpg"])
    assert file_visibility.lacking(files) == []
    (folder / "photos" / "01.jpg").write_bytes(b"another")
    (folder / "photos" / "00.jpg").unlink()
    assert [Path(name).name for name in file_visibility.lacking(files)] == ["00.jpg", "01.jpg"]


@pytest.mark.cluster
def test_a_node_is_asked_by_ray(folder: Path) -> None:
    import ray

    with cluster.start(Cluster()):
        assert file_visibility.other_machines() == {}, "an own cluster is this machine"
        node = {ray.get_runtime_context().get_node_id(): "here", "ab" * 28: "gone"}
        there = str(folder / "photos" / "00.jpg")
        assert file_visibility.unseen({there: 1, str(folder / "none.jpg"): 1}, node) == {
            "here": [str(folder / "none.jpg")]
        }


# --- the command line -------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_command_refuses_with_all_of_it_and_starts_nothing(folder: Path, command: str) -> None:
    overrides = ["stages.publish.names=[smal]", "stages.align.student=tin", "stages.curate.clusters=100"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", command, "pipeline.yaml", *overrides],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
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
