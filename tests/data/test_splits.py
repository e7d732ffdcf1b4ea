"""Splits: what is in which, by each way to say it; what overlaps is found by content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from orchestrator.config.schema import DataSource
from orchestrator.config.split import SPLITS, Split
from orchestrator.data.curation.descriptor import describe
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.splits import Splits, split_by_hash
from orchestrator.errors import UserError

FOLDERS = ("train", "val", "test")


def picture(seed: int, brighter: int = 0) -> np.ndarray:
    """A smooth random picture: others of another seed are not near duplicates of it."""
    noise = np.random.default_rng(seed).integers(0, 200, (6, 6, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((40, 40), Image.Resampling.BICUBIC), dtype=np.int64)
    return np.clip(pixels + brighter, 0, 255).astype(np.uint8)


def record(folder: Path, name: str, pixels: np.ndarray, label: str | None = None, **more: str) -> ImageRecord:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ImageRecord("photos", name, str(folder), digest, 40, 40, label=label, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.fixture
def rows(folder: Path) -> list[ImageRecord]:
    """Six pictures in each of three folders, of two labels."""
    return [
        record(folder, f"{part}/{at}.png", picture(10 * number + at), "ab"[at % 2])
        for number, part in enumerate(FOLDERS)
        for at in range(6)
    ]


def by_folder(**more: object) -> Split:
    return Split.model_validate(
        {"by": "folder", "train": "train", "validation": "val", "test": "test"} | more
    )


def names(index: ImageIndex, splits: Splits) -> dict[str, list[str]]:
    return {name: [index[int(row)].path for row in splits[name]] for name in SPLITS}


EXPECTED = {
    "train": [f"train/{at}.png" for at in range(6)],
    "validation": [f"val/{at}.png" for at in range(6)],
    "test": [f"test/{at}.png" for at in range(6)],
}


@pytest.mark.parametrize("prefix", ["", "photos/"])
def test_by_folder(rows: list[ImageRecord], prefix: str) -> None:
    index = ImageIndex(rows)
    split = by_folder(train=f"{prefix}train", validation=[f"{prefix}val/"], test=f"{prefix}test")
    splits = Splits.of(index, split)
    assert names(index, splits) == EXPECTED
    assert splits.warnings == ()
    assert splits.num_outside == 0
    assert str(splits) == "6 train, 6 validation, 6 test"


def test_whole_datasets_are_splits(rows: list[ImageRecord]) -> None:
    index = ImageIndex([replace(row, source=f"set-{row.path.partition('/')[0]}") for row in rows])
    splits = Splits.of(index, by_folder(train="set-train", validation="set-val", test="set-test"))
    assert names(index, splits) == EXPECTED


def test_validation_comes_out_of_train_where_nothing_is_named(rows: list[ImageRecord]) -> None:
    index = ImageIndex(rows)
    splits = Splits.of(index, by_folder(validation=(), validation_share=0.5, seed=1))
    found = names(index, splits)
    assert sorted(found["train"] + found["validation"]) == EXPECTED["train"]
    assert found["test"] == EXPECTED["test"]
    assert splits.num_outside == 6
    assert found["train"]
    assert found["validation"]


def test_by_lists_of_files(rows: list[ImageRecord], tmp_path: Path) -> None:
    index = ImageIndex(rows)
    for name, files in EXPECTED.items():
        lines = [f"photos/{file}" if at % 2 else f"./{file}" for at, file in enumerate(files)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    split = Split.model_validate({"by": "file"} | {name: str(tmp_path / f"{name}.txt") for name in SPLITS})
    assert names(index, Splits.of(index, split)) == EXPECTED
    assert set(split.files()) == set(SPLITS)
    (tmp_path / "test.txt").write_text("test/0.png\ntest/00.png\n")
    with pytest.raises(UserError, match=r"'test/00\.png' is not a picture of the index") as caught:
        Splits.of(index, split)
    assert caught.value.where == f"{tmp_path}/test.txt:2"
    assert caught.value.hint == "did you mean 'test/0.png'?"
    (tmp_path / "test.txt").write_text("train/3.png\n")
    with pytest.raises(UserError, match=r"'photos/train/3\.png' is in train and in test"):
        Splits.of(index, split)


@pytest.mark.parametrize("own_table", [False, True])
def test_by_a_column(rows: list[ImageRecord], folder: Path, own_table: bool) -> None:
    index = ImageIndex(rows)
    values = {"train": "learn", "val": "tune", "test": "judge"}
    table = folder / "notes.csv"
    lines = [f"{row.path},{row.label},{values[row.path.partition('/')[0]]}" for row in rows]
    table.write_text("file,label,Part\n" + "\n".join(lines) + "\n")
    named = {"train": "learn", "validation": "tune", "test": "judge"}
    split = Split.model_validate(
        {"by": "column", "column": "part", "table": table if own_table else None} | named
    )
    sources = {"photos": DataSource(path=folder, captions=None if own_table else Path("notes.csv"))}
    assert names(index, Splits.of(index, split, sources=sources)) == EXPECTED
    assert split.files() == ({"table": (table,)} if own_table else {})
    with pytest.raises(UserError, match="no column 'parts'") as caught:
        Splits.of(index, split.model_copy(update={"column": "parts"}), sources=sources)
    assert "did you mean 'part'?" in str(caught.value)
    with pytest.raises(UserError, match="rows of 'judged'") as caught:
        Splits.of(index, split.model_copy(update={"test": ("judged",)}), sources=sources, where="s.split")
    assert caught.value.where == "s.split.test"
    assert "'judge'" in str(caught.value.hint)


def test_a_column_of_a_dataset_without_captions(rows: list[ImageRecord], folder: Path) -> None:
    split = Split.model_validate({"by": "column", "train": "a", "test": "b"})
    with pytest.raises(UserError, match="'photos' has no captions file with a column 'split'"):
        Splits.of(ImageIndex(rows), split, sources={"photos": DataSource(path=folder)})


def test_by_component(rows: list[ImageRecord]) -> None:
    components = {"train": "balanced", "val": "pool", "test": "held_out"}
    index = ImageIndex([replace(row, component=components[row.path.partition("/")[0]]) for row in rows])
    split = Split.model_validate(
        {"by": "component", "train": "balanced", "validation": "pool", "test": "held_out"}
    )
    assert names(index, Splits.of(index, split)) == EXPECTED
    with pytest.raises(UserError, match="no picture of the index is in the component 'heldout'") as caught:
        Splits.of(index, split.model_copy(update={"test": ("heldout",)}))
    assert caught.value.hint == "did you mean 'held_out'?"


# --- by hash ----------------------------------------------------------------------------------------------------


def many(folder: Path, count: int) -> tuple[ImageIndex, Path]:
    """An index without files, with the descriptors that a curation would have kept."""
    rng = np.random.default_rng(0)
    shas = [hashlib.sha256(str(at).encode()).hexdigest() for at in range(count)]
    folder.mkdir()
    unit = rng.normal(size=(count, 336)).astype(np.float32)
    np.save(folder / "embeddings.npy", unit / np.linalg.norm(unit, axis=1, keepdims=True))
    return ImageIndex([ImageRecord("x", f"{at}.png", "/x", sha, 1, 1) for at, sha in enumerate(shas)]), folder


def test_shares_of_a_split_by_hash(tmp_path: Path) -> None:
    index, folder = many(tmp_path / "index", 4000)
    splits = Splits.of(index, Split(test_share=0.3, validation_share=0.1), folder=folder)
    # Four standard deviations.
    assert abs(len(splits.test) - 1200) < 4 * np.sqrt(4000 * 0.3 * 0.7)
    assert abs(len(splits.validation) - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9)
    together = np.concatenate([splits[name] for name in SPLITS])
    assert sorted(together.tolist()) == list(range(4000))
    other = Splits.of(index, Split(test_share=0.3, validation_share=0.1, seed=1), folder=folder)
    assert 0.2 < np.isin(other.test, splits.test).mean() < 0.4, "another seed is another split"


def test_a_split_by_hash_stays_when_files_are_added(tmp_path: Path) -> None:
    index, folder = many(tmp_path / "more", 300)
    fewer = ImageIndex([index[row] for row in range(0, 300, 3)])
    (tmp_path / "fewer").mkdir()
    np.save(tmp_path / "fewer" / "embeddings.npy", np.load(folder / "embeddings.npy")[::3])
    before, after = (
        Splits.of(fewer, Split(), folder=tmp_path / "fewer"),
        Splits.of(index, Split(), folder=folder),
    )
    for name in SPLITS:
        assert {fewer[int(row)].path for row in before[name]} <= {index[int(row)].path for row in after[name]}


def test_near_duplicates_are_in_one_split_by_hash(folder: Path) -> None:
    index = ImageIndex(
        [
            record(folder, f"{seed}-{brighter}.png", picture(seed, brighter))
            for seed in range(12)
            for brighter in (0, 1, 2)
        ]
    )
    splits = Splits.of(index, Split())
    for name in SPLITS:
        seeds = [index[int(row)].path.partition("-")[0] for row in splits[name]]
        assert all(seeds.count(seed) == 3 for seed in seeds)
    # Their bytes alone would have torn some of them apart.
    alone = [split_by_hash(index[row].sha256, Split()) for row in range(len(index))]
    assert any(len(set(alone[at : at + 3])) > 1 for at in range(0, 36, 3))


# --- overlap ----------------------------------------------------------------------------------------------------


def test_equal_bytes_in_two_splits_are_an_error(rows: list[ImageRecord], folder: Path) -> None:
    again = record(folder, "test/copy.png", picture(1), "b")
    index = ImageIndex([*rows, again])
    with pytest.raises(UserError) as caught:
        Splits.of(index, by_folder(), where="stages.evaluate.split")
    assert caught.value.what == (
        "photos/train/1.png is in train, and photos/test/copy.png in test, with the same picture"
    )
    assert caught.value.where == "stages.evaluate.split"
    assert caught.value.hint


@pytest.mark.parametrize("reason", ["the same bytes", "the same pixels"])
def test_a_copy_that_the_curation_left_out_is_an_error(
    rows: list[ImageRecord], tmp_path: Path, reason: str
) -> None:
    artifact = curated(tmp_path, rows, ("test/copy.png", "photos/val/1.png", reason))
    with pytest.raises(
        UserError, match=r"photos/val/1.png is in validation, and photos/test/copy.png in test"
    ):
        Splits.of(ImageIndex(rows), by_folder(), folder=artifact)


def test_a_near_copy_that_the_curation_left_out_is_none(rows: list[ImageRecord], tmp_path: Path) -> None:
    artifact = curated(tmp_path, rows, ("test/copy.png", "photos/val/1.png", "nearly the same pixels"))
    assert len(Splits.of(ImageIndex(rows), by_folder(), folder=artifact).test) == 6


def test_a_list_may_name_what_the_curation_left_out(rows: list[ImageRecord], tmp_path: Path) -> None:
    artifact = curated(tmp_path, rows, ("train/copy.png", "photos/train/1.png", "the same bytes"))
    for name, files in EXPECTED.items():
        (tmp_path / f"{name}.txt").write_text("\n".join([*files, *["train/copy.png"] * (name == "train")]))
    split = Split.model_validate({"by": "file"} | {name: str(tmp_path / f"{name}.txt") for name in SPLITS})
    index = ImageIndex(rows)
    assert names(index, Splits.of(index, split, folder=artifact)) == EXPECTED


def curated(tmp_path: Path, rows: list[ImageRecord], copy: tuple[str, str, str]) -> Path:
    """What the curation leaves beside its index, with one file that is a copy of another one."""
    folder = tmp_path / "curate"
    folder.mkdir()
    path, of, reason = copy
    unique = [{"source": "photos", "path": row.path, "status": "unique"} for row in rows]
    left = {
        "source": "photos",
        "path": path,
        "status": "duplicate",
        "reason": f"{reason} as {of}",
        "duplicate_of": of,
    }
    columns = ("source", "path", "status", "reason", "duplicate_of")
    table = [{name: one.get(name) for name in columns} for one in (*unique, left)]
    pq.write_table(pa.Table.from_pylist(table), folder / "provenance.parquet")
    return folder


def test_near_duplicates_in_two_splits_are_told(
    rows: list[ImageRecord], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = ImageIndex([*rows, record(folder, "test/bright.png", picture(0, 2), "a")])
    splits = Splits.of(index, by_folder())
    assert splits.num_near == 1
    splits.warn(logging.getLogger("orchestrator"))
    assert "1 pair of pictures is nearly the same and in different splits, such as photos/train/0.png (train) and "
    assert "photos/test/bright.png (test)" in caplog.text
    cosine = float(describe(picture(0)) @ describe(picture(0, 2)))
    assert Splits.of(index, by_folder(near_duplicate=min(1.0, cosine + 1e-4))).num_near == 0


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_a_picture_in_folders_of_two_splits(rows: list[ImageRecord], folder: Path) -> None:
    index = ImageIndex([*rows, record(folder, "train/hard/1.png", picture(99))])
    with pytest.raises(UserError, match=r"photos/train/hard/1.png is in 'train.*' and in 'train.*'"):
        Splits.of(index, by_folder(test="train/hard"))


def test_a_folder_that_is_not_there(rows: list[ImageRecord]) -> None:
    with pytest.raises(UserError, match="no picture of the index is in the folder 'tests'") as caught:
        Splits.of(ImageIndex(rows), by_folder(test="tests"), where="split")
    assert caught.value.where == "split.test"
    assert caught.value.hint == "did you mean 'test'?"


def test_a_split_without_pictures(rows: list[ImageRecord]) -> None:
    with pytest.raises(UserError, match="the split 'test' has no pictures") as caught:
        Splits.of(ImageIndex(rows), Split(test_share=1e-9))
    assert "too few" in str(caught.value.hint)
    with pytest.raises(UserError, match="the split 'validation' has no pictures") as caught:
        Splits.of(ImageIndex(rows), by_folder(validation=(), validation_share=1e-9))
    assert "validation_share" in str(caught.value.hint)


def _one_label(row: ImageRecord) -> ImageRecord:
    return replace(row, label="a")


def _unseen(row: ImageRecord) -> ImageRecord:
    return replace(row, label="carr") if row.path == "test/1.png" else row


def _no_label(row: ImageRecord) -> ImageRecord:
    return replace(row, label=None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_one_label, "the 6 pictures of train have only one label, 'a'"),
        (_no_label, "the 6 pictures of train have no labels"),
        (_unseen, "test has 1 label that train lacks: 'carr'"),
    ],
)
def test_labels_that_cannot_be_learned(
    rows: list[ImageRecord], change: Callable[[ImageRecord], ImageRecord], said: str
) -> None:
    index = ImageIndex(list(map(change, rows)))
    with pytest.raises(UserError, match=said):
        Splits.of(index, by_folder()).labels(index)


def test_labels(rows: list[ImageRecord]) -> None:
    index = ImageIndex([replace(row, label=None) if row.path == "test/0.png" else row for row in rows])
    assert Splits.of(index, by_folder()).labels(index) == ("a", "b")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train": "a"}, "`train` names pictures, but the split is by hash"),
        ({"test_share": 0.6, "validation_share": 0.4}, "leave nothing to train on"),
        ({"by": "folder", "train": "a"}, "lacks `test`"),
        ({"by": "folder", "train": ["a", "b"], "test": "b"}, "'b' is in `train` and in `test`"),
        ({"by": "folder", "train": "a", "test": "b", "table": "t.csv"}, "reads no table"),
        ({"test_share": 0}, "greater than 0"),
        ({"by": "day"}, "by"),
    ],
)
def test_what_a_split_cannot_be(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Split.model_validate(config)


def test_a_folder_is_in_one_split_however_it_is_written(rows: list[ImageRecord]) -> None:
    with pytest.raises(UserError, match="the folder 'val/' is in train and in test") as caught:
        Splits.of(ImageIndex(rows), by_folder(train=["train", "val"], validation=(), test=["test", "val/"]))
    assert caught.value.where == "split.test"


def test_a_list_takes_names_with_ends_of_lines_of_others(
    folder: Path, rows: list[ImageRecord], tmp_path: Path
) -> None:
    odd = "train/a\u2028b\x85c.png"
    index = ImageIndex([*rows, record(folder, odd, picture(77))])
    lists = {name: tmp_path / f"{name}.txt" for name in SPLITS}
    for name, listed in EXPECTED.items():
        more = [odd] if name == "train" else []
        lists[name].write_bytes("\r\n".join([*listed, *more, ""]).encode())
    split = Split.model_validate({"by": "file", **{name: str(path) for name, path in lists.items()}})
    assert odd in names(index, Splits.of(index, split))["train"]
    lists["test"].unlink()
    with pytest.raises(UserError, match=r"test.txt cannot be read: No such file or directory") as caught:
        Splits.of(index, split)
    assert caught.value.hint == "give the path of a text file with one picture per line"
