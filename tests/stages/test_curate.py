"""Curation on photographs with known faults: everything found, accounted for, and reproducible."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from orchestrator.config.schema import DataSource
from orchestrator.data.index import ImageIndex
from orchestrator.data.sources import account
from orchestrator.errors import Stopped, UserError
from orchestrator.stages.base import Context
from orchestrator.stages.curate import curation
from orchestrator.stages.curate.config import Curate
from orchestrator.stages.curate.scan import Scanned

from .curating import curation_context

_KINDS = 4
_EACH = (12, 9, 6, 3)


def _picture(kind: int, seed: int) -> np.ndarray:
    """Pictures of a kind share their colour; the seed moves the pattern."""
    rng = np.random.default_rng((kind, seed))
    base = np.array([(200, 60, 60), (60, 190, 60), (50, 60, 200), (225, 225, 215)][kind])
    y, x = np.mgrid[0:40, 0:60]
    a, b = (rng.uniform(4, 9, 2), rng.uniform(0, 6, 2))
    pattern = 25 * np.sin(x / a[0] + b[0]) * np.cos(y / a[1] + b[1])
    return (base + pattern[..., None]).clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of any picture."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 pictures of four kinds; two byte copies, a pixel copy, a recompressed copy; two broken files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["file,caption,label"]
    for kind, count in enumerate(_EACH):
        for i in range(count):
            name = f"{kind}-{i:02}.jpg"
            Image.fromarray(_picture(kind, i)).save(folder / name, quality=92)
            lines.append(f"{name},picture {i} of {kind},kind {kind}")
    shutil.copy(folder / "0-03.jpg", folder / "x-copy.jpg")
    shutil.copy(folder / "0-03.jpg", folder / "x-copy2.jpg")
    Image.open(folder / "1-02.jpg").save(folder / "y-pixels.png")
    Image.fromarray(_picture(2, 1)).save(folder / "z-again.jpg", quality=60)
    (folder / "broken.jpg").write_bytes((folder / "0-00.jpg").read_bytes()[:400])
    (folder / "empty.png").write_bytes(b"")
    (folder / "captions.csv").write_text("\n".join([*lines, "x-copy.jpg,something else,kind 1"]))
    return folder


def _source(folder: Path) -> DataSource:
    return DataSource(path=folder, captions=Path("captions.csv"))


def test_everything_is_found_and_accounted_for(photos: Path, tmp_path: Path) -> None:
    context = curation_context(tmp_path, photos=_source(photos))
    stage = Curate(kind="curate", data="photos", clusters=4, sample=16)
    summary = stage.run(context)
    assert summary == {
        "images": 36,
        "unique": 30,
        "corrupt": 2,
        "duplicates": 4,
        "left_out": 0,
        "clusters": 4,
    }
    assert {path.name for path in context.out.iterdir()} == set(stage.outputs)

    index = ImageIndex.load(context.out)
    assert len(index) == 30
    assert index.rows_of("balanced").size == 16
    assert index.rows_of("pool").size == 14
    assert index.path(0) == photos.resolve() / "0-00.jpg"
    assert (index[0].caption, index[0].label) == ("picture 0 of 0", "kind 0")
    embeddings = np.load(context.out / "embeddings.npy")
    assert embeddings.shape == (30, 336)

    files = {row["path"]: row for row in pq.read_table(context.out / "provenance.parquet").to_pylist()}
    assert len(files) == 36
    expected = {
        "x-copy.jpg": ("duplicate", "the same bytes as photos/0-03.jpg"),
        "x-copy2.jpg": ("duplicate", "the same bytes as photos/0-03.jpg"),
        "y-pixels.png": ("duplicate", "the same pixels as photos/1-02.jpg"),
        "z-again.jpg": ("duplicate", "nearly the same pixels as photos/2-01.jpg"),
        "empty.png": ("corrupt", "the file is empty"),
    }
    for name, (status, reason) in expected.items():
        assert (files[name]["status"], files[name]["reason"], files[name]["id"]) == (status, reason, None)
    assert files["broken.jpg"]["status"] == "corrupt"
    assert all(files[index[i].path]["id"] == i for i in range(30))
    assert {files[index[i].path]["reason"] for i in index.rows_of("pool")} == {"pool component"}


def test_clusters_follow_looks_and_small_ones_are_taken_whole(photos: Path, tmp_path: Path) -> None:
    context = curation_context(tmp_path, photos=_source(photos))
    Curate(kind="curate", data="photos", clusters=4, sample=16).run(context)
    index = ImageIndex.load(context.out)
    labels, clusters = np.array(index.labels), index.clusters
    assert [len(set(clusters[labels == f"kind {kind}"])) for kind in range(_KINDS)] == [1] * _KINDS
    assert np.bincount(clusters).tolist() == sorted(_EACH, reverse=True)
    # 16 from clusters of 12, 9, 6, 3: the smallest gives all 3, the others 4 or 5.
    taken = np.bincount(clusters[index.rows_of("balanced")])
    assert taken[3] == 3
    assert sorted(taken[:3]) == [4, 4, 5]


def test_levels_of_clusters(photos: Path, tmp_path: Path) -> None:
    """The index has the coarsest level, `levels.npy` all; photos of one kind stay together at the coarsest."""
    context = curation_context(tmp_path, photos=_source(photos))
    Curate(kind="curate", data="photos", clusters=[12, 4], sample=16).run(context)
    index = ImageIndex.load(context.out)
    levels = np.load(context.out / "levels.npy")
    assert levels.shape == (30, 2)
    assert levels.dtype == np.int32
    assert np.array_equal(levels[:, 1], index.clusters)
    assert [len(np.unique(column)) for column in levels.T] == [12, 4]
    assert np.bincount(index.clusters).tolist() == sorted(_EACH, reverse=True)
    taken = np.bincount(index.clusters[index.rows_of("balanced")])
    assert sorted(taken) == [3, 4, 4, 5]
    report = json.loads((context.out / "report.json").read_text())
    assert [level["clusters"] for level in report["levels"]] == [12, 4]
    assert report["levels"][0]["inertia"] > 0


def test_a_number_of_clusters_is_one_level() -> None:
    plain = Curate(kind="curate", data="photos", clusters=12)
    assert plain.clusters == (12,)
    assert plain.identity() == Curate(kind="curate", data="photos", clusters=[12]).identity()
    assert plain.identity() != Curate(kind="curate", data="photos", clusters=12, resampling=0).identity()
    with pytest.raises(ValidationError, match="has 12 clusters of 12: give the finest level first"):
        Curate(kind="curate", data="photos", clusters=[100, 12, 12])


def test_report(photos: Path, tmp_path: Path) -> None:
    context = curation_context(tmp_path, photos=_source(photos))
    Curate(kind="curate", data="photos", clusters=4, sample=0.5).run(context)
    report = json.loads((context.out / "report.json").read_text())
    assert report["components"] == {"balanced": 15, "pool": 15}
    assert set(report["corrupt_files"]) == {"photos/broken.jpg", "photos/empty.png"}
    largest = report["duplicate_groups"][0]
    assert largest["kept"] == "photos/0-03.jpg"
    assert set(largest["dropped"]) == {"photos/x-copy.jpg", "photos/x-copy2.jpg"}
    assert (largest["captions_differ"], largest["labels_differ"]) == (True, True)
    assert sum(cluster["photos"] for cluster in report["cluster_sizes"].values()) == 30
    assert str(tmp_path) not in (context.out / "report.json").read_text()
    sheet = np.asarray(Image.open(context.out / "clusters.png"))
    assert sheet.std() > 20


def test_the_log_names_the_first_files_that_are_not_used(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestrator")
    Curate(kind="curate", data="photos", clusters=4).run(curation_context(tmp_path, photos=_source(photos)))
    said = {record.levelname: record.getMessage() for record in caplog.records}
    assert said["WARNING"].startswith("curate: 2 photos cannot be read: photos/broken.jpg (")
    assert said["WARNING"].endswith("; photos/empty.png (the file is empty)")
    assert said["INFO"].startswith(
        "curate: 4 duplicates are left out: photos/x-copy.jpg (as photos/0-03.jpg); "
    )
    assert said["INFO"].endswith("; and 1 more in report.json")


def test_a_files_name_does_not_break_a_line_of_the_log(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "a\nb\x1b[2J.png").write_bytes(b"")
    Curate(kind="curate", data="photos", clusters=4).run(curation_context(tmp_path, photos=_source(photos)))
    said = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "photos/a\\nb\\x1b[2J.png (the file is empty)" in said
    assert said.isprintable()


def test_what_is_no_photo_is_in_the_report_with_its_reason(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "pipe.jpg")
    (photos / "scan.dcm").write_bytes(b"DICM")
    source = _source(photos).model_copy(update={"max_left_out": 0.2})
    context = curation_context(tmp_path, photos=source)
    Curate(kind="curate", data="photos", clusters=4).run(context)
    report = json.loads((context.out / "report.json").read_text())
    assert report["left_out_files"] == {
        "photos/pipe.jpg": "not a file but a pipe",
        "photos/scan.dcm": "its name ends in .dcm",
    }
    assert report["left_out"] == 2
    assert report["images"] == 36
    rows = pq.read_table(context.out / "provenance.parquet").to_pylist()
    left_out = [row["path"] for row in rows if row["status"] == "left out"]
    assert left_out == ["pipe.jpg", "scan.dcm"]


def test_a_photo_that_goes_while_curation_runs_is_corrupt(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = curation.scan_sources

    def scan_and_lose(context: Context, names: Sequence[str]) -> Scanned:
        found = plain(context, names)
        (photos / "0-05.jpg").unlink()
        return found

    monkeypatch.setattr(curation, "scan_sources", scan_and_lose)
    context = curation_context(tmp_path, photos=_source(photos))
    summary = Curate(kind="curate", data="photos", clusters=4).run(context)
    assert (summary["unique"], summary["corrupt"]) == (29, 3)
    report = json.loads((context.out / "report.json").read_text())
    assert report["corrupt_files"]["photos/0-05.jpg"] == "No such file or directory"


def test_same_seed_same_files_and_other_seed_other_sample(photos: Path, tmp_path: Path) -> None:
    stage = Curate(kind="curate", data="photos", clusters=4, sample=0.4)
    one, two, other = (curation_context(tmp_path, seed, photos=_source(photos)) for seed in (0, 0, 1))
    for context in (one, two, other):
        stage.run(context)
    for name in stage.outputs:
        assert (one.out / name).read_bytes() == (two.out / name).read_bytes(), name
    indices = [ImageIndex.load(context.out) for context in (one, other)]
    assert indices[0].rows_of("balanced").tolist() != indices[1].rows_of("balanced").tolist()


def test_photos_are_held_out_by_their_bytes(photos: Path, tmp_path: Path) -> None:
    """Whatever the seed, the names and the other photos; what is chosen of the others stays as it was."""

    def held_out(share: float, seed: int = 0, source: Path = photos) -> tuple[set[str], ImageIndex]:
        context = curation_context(tmp_path, seed, photos=DataSource(path=source))
        Curate(kind="curate", data="photos", clusters=4, sample=0.4, holdout=share).run(context)
        index = ImageIndex.load(context.out)
        return {index[int(row)].sha256 for row in index.rows_of("held_out")}, index

    (none, plain), (third, index) = held_out(0.0), held_out(0.3)
    assert not none
    assert 3 <= len(third) <= 16
    assert held_out(0.3, seed=1)[0] == third
    assert third < held_out(0.6)[0]
    for row in range(len(index)):
        if index[row].sha256 not in third:
            assert index[row].component == plain[row].component
    assert "held_out" not in index.chosen
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for number, file in enumerate(sorted(photos.glob("[01]-*.jpg"))):
        shutil.copy(file, fewer / f"renamed-{number}.jpg")
    mine, smaller = held_out(0.3, source=fewer)
    assert mine == third & {smaller[row].sha256 for row in range(len(smaller))}


def test_only_a_holdout_that_is_set_is_part_of_the_key() -> None:
    plain = Curate(kind="curate", data="photos")
    assert "holdout" not in plain.identity()
    assert Curate(kind="curate", data="photos", holdout=0.0).identity() == plain.identity()
    assert Curate(kind="curate", data="photos", holdout=0.1).identity()["holdout"] == 0.1


def test_of_equal_photos_the_first_sources_is_kept(photos: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    shutil.copy(photos / "3-00.jpg", more / "a.jpg")
    Image.fromarray(_picture(0, 99)).save(more / "new.jpg")
    context = curation_context(tmp_path, photos=_source(photos), more=DataSource(path=more))
    summary = Curate(kind="curate", data=["more", "photos"], clusters=4).run(context)
    assert (summary["unique"], summary["duplicates"]) == (31, 5)
    index = ImageIndex.load(context.out)
    assert [(index[i].source, index[i].path) for i in range(2)] == [("more", "a.jpg"), ("more", "new.jpg")]
    files = pq.read_table(context.out / "provenance.parquet").to_pylist()
    assert [row["duplicate_of"] for row in files if row["path"] == "3-00.jpg"] == ["more/a.jpg"]


def test_everything_can_be_taken(photos: Path, tmp_path: Path) -> None:
    context = curation_context(tmp_path, photos=_source(photos))
    Curate(kind="curate", data="photos", clusters=1, sample=1.0).run(context)
    assert ImageIndex.load(context.out).components == ["balanced"]


def _mistake(context: Context, **changes: object) -> str:
    with pytest.raises(UserError) as raised:
        Curate(**{"kind": "curate", "data": "photos", "clusters": 4, **changes}).run(context)  # type: ignore[arg-type]
    return str(raised.value)


def test_mistakes_are_named(photos: Path, tmp_path: Path) -> None:
    context = curation_context(tmp_path, photos=_source(photos))
    assert "did you mean 'photos'?" in _mistake(context, data="photo")
    assert "31 clusters cannot be made of 30 different photos" in _mistake(context, clusters=31)
    assert "stages.curate.sample" in _mistake(context, sample=31)
    missing = replace(context, sources={"photos": DataSource(path=tmp_path / "nowhere")})
    assert "does not exist" in _mistake(missing)
    (tmp_path / "empty").mkdir()
    empty = replace(context, sources={"photos": DataSource(path=tmp_path / "empty")})
    assert "there are no images" in _mistake(empty)
    broken = tmp_path / "allbroken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"nothing")
    unreadable = replace(context, sources={"photos": DataSource(path=broken)})
    assert "none of the 1 images can be read; a.jpg: not an image" in _mistake(unreadable)
    assert list(context.out.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"sample": 0},
        {"sample": 1.5},
        {"clusters": 0},
        {"clusters": []},
        {"resampling": -1},
        {"data": []},
        {"embedding": "dino"},
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Curate(**{"kind": "curate", "data": "photos", **wrong})  # type: ignore[arg-type]


def test_stop_is_heeded(photos: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Curate(kind="curate", data="photos", clusters=4).run(
            replace(curation_context(tmp_path, photos=_source(photos)), stop=stop)
        )


def test_planning_with_the_stage_loads_nothing_heavy() -> None:
    code = (
        "import sys, orchestrator.stages.curate.config\n"
        "assert not {'torch', 'ray', 'mlflow', 'sklearn', 'pyarrow', 'pandas'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_real_photographs(tmp_path: Path) -> None:
    """The 542 food photographs, where they were fetched: 96 files in 17 groups are exact copies."""
    folder = Path(__file__).resolve().parents[2] / "data" / "food"
    if not (folder / "captions.csv").is_file():
        pytest.skip("fetch them with: python -m orchestrator.data.samples food data/food")
    context = curation_context(tmp_path, food=_source(folder))
    summary = Curate(kind="curate", data="food").run(context)
    assert summary == {
        "images": 542,
        "unique": 463,
        "corrupt": 0,
        "duplicates": 79,
        "left_out": 0,
        "clusters": 16,
    }
    report = json.loads((context.out / "report.json").read_text())
    assert len(report["duplicate_groups"]) == 17
    assert sum(len(group["dropped"]) + 1 for group in report["duplicate_groups"]) == 96


def test_a_share_of_lost_pictures_stops_with_the_question(photos: Path, tmp_path: Path) -> None:
    for number in range(6):
        (photos / f"{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    stage = Curate(kind="curate", data="photos", clusters=4)
    with pytest.raises(
        UserError, match=r"8 of the files of dataset 'photos'.*6 ending \(\.heic 6\), 2 damaged"
    ):
        stage.run(curation_context(tmp_path, photos=_source(photos)))
    allowed = _source(photos).model_copy(update={"max_left_out": 0.25})
    assert stage.run(curation_context(tmp_path, photos=allowed))["left_out"] == 6


def test_the_account_is_shown_and_kept(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "orchestrator")
    context = curation_context(tmp_path, photos=_source(photos))
    Curate(kind="curate", data="photos", clusters=4).run(context)
    kept = [record.getMessage() for record in caplog.records if getattr(record, "kept", False)]
    assert kept == [
        "dataset  files  taken  left out",
        "photos      36     30  2 damaged, 3 duplicate, 1 near duplicate",
    ]
    (one,) = account.load(context.out)
    assert (one.files, one.taken) == (36, 30)
    assert one.left_out["duplicate"] == {"the same bytes": 2, "the same pixels": 1}
    report = json.loads((context.out / "report.json").read_text())
    assert report["account"]["photos"]["examples"]["damaged"] == ["broken.jpg", "empty.png"]


def test_what_looks_nearly_the_same_is_told_and_chosen(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Curate(kind="curate", data="photos", clusters=1)
    (choice,) = stage.choices()
    assert "at most 3 grey levels and 0.15 times the usual difference in their dataset" in choice
    assert "all kept" in stage.model_copy(update={"near_duplicate": 0.0}).choices()[0]
    still = tmp_path / "still"
    still.mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).standard_normal((40, 60, 3)) * 2
        Image.fromarray((_picture(1, 0) + noise).clip(0, 255).astype(np.uint8)).save(
            still / f"{number:02}.png"
        )
    context = curation_context(tmp_path, photos=DataSource(path=still))
    assert stage.run(context)["unique"] == 12
    warning = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "look nearly like another one, and are kept" in warning
    assert "near_duplicate_relative" in warning
    absolute = stage.model_copy(update={"near_duplicate_relative": None, "near_duplicate": 8.0})
    again = curation_context(tmp_path, photos=DataSource(path=still))
    assert absolute.run(again)["unique"] == 1
    report = json.loads((again.out / "report.json").read_text())["near_duplicate_limits"]["photos"]
    assert (report["dropped"], report["limit"]) == (11, 8.0)
    assert report["dropped_pairs"][0] == ["01.png", "photos/00.png"]
