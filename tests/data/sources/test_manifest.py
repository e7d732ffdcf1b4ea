"""Manifests in all their forms, and labels of folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from orchestrator.config.schema import DataSource
from orchestrator.data.blocks import CaptionBlocks
from orchestrator.data.curation.mix import count_draws, sample_order
from orchestrator.data.curation.selection import filter_images, index_rows
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.sources.folder import fingerprint, list_images
from orchestrator.data.sources.scan import scan
from orchestrator.data.sources.source_captions import captions_of
from orchestrator.errors import UserError

ROWS = [
    {"path": "a.jpg", "captions": ["a temple", "a roof"], "label": "temple"},
    {"path": "sub/b", "captions": ["a garden"], "label": "garden"},
    {"path": "sub/c.bin", "captions": [], "label": None},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parts of a real photograph; two have names that no picture has, and one is in no manifest."""
    root, photo = tmp_path / "photos", load_sample_image("china.jpg")
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "sub/b", "sub/c.bin", "unnamed.jpg")):
        with (root / name).open("wb") as file:
            Image.fromarray(photo[100 * number : 100 * number + 90, :120]).save(file, "JPEG")
    return root


def _csv(path: Path) -> None:
    lines = ["path;label;caption"]
    for row in ROWS:
        texts: Sequence[str] = row["captions"] or [""]  # type: ignore[assignment]
        lines += [f"{row['path']};{row['label'] or ''};{text}" for text in texts]
    path.write_text("\n".join(lines))


def _jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")


def _parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {"m.csv": _csv, "m.jsonl": _jsonl, "m.parquet": _parquet}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("inside", [True, False])
def test_all_forms_say_the_same(folder: Path, tmp_path: Path, name: str, inside: bool) -> None:
    path = folder / name if inside else tmp_path / name
    WRITERS[name](path)
    source = DataSource(path=folder, manifest=Path(name) if inside else path)
    listing = list_images(source, "x")
    assert listing.files == ("a.jpg", "sub/b", "sub/c.bin")
    assert listing.left_out == ()
    photos = scan(source, "x", listing)
    assert [photo.error for photo in photos] == [None] * 3
    assert [(photo.caption, photo.label, photo.captions) for photo in photos] == [
        ("a temple", "temple", ("a temple", "a roof")),
        ("a garden", "garden", ()),
        (None, None, ()),
    ]
    said = captions_of(source, "x", listing.files)
    assert (said.num_captions, said.num_labels) == (2, 2)


def test_the_key_follows_the_manifest_and_what_it_names(folder: Path, tmp_path: Path) -> None:
    _jsonl(tmp_path / "m.jsonl")
    source = DataSource(path=folder, manifest=tmp_path / "m.jsonl")
    first = fingerprint(source)
    (folder / "other.jpg").write_bytes(b"nobody names it")
    assert fingerprint(source) == first
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"path": "unnamed.jpg"}\n')
    second = fingerprint(source)
    assert second != first
    (folder / "a.jpg").write_bytes((folder / "sub" / "b").read_bytes())
    assert fingerprint(source) != second


def test_files_that_are_not_there_are_left_out_with_their_reason(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    lines = [
        *({"path": row["path"]} for row in ROWS),
        {"path": "gone.jpg"},
        {"path": "pipe.jpg"},
        {"path": "sub"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = DataSource(path=folder, manifest=tmp_path / "m.jsonl")
    listing = list_images(source, "x")
    assert len(listing.files) == 3
    assert {item.path: item.reason for item in listing.left_out} == {
        "gone.jpg": "does not exist",
        "pipe.jpg": "not a file",
        "sub": "not a file",
    }
    assert listing.account("x").lost == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.csv", "image,caption\na.jpg,x", ["no `path` column", "rename the column 'image' to `path`"]),
        ("m.csv", "path,caption\n../a.jpg,x", ["'../a.jpg'", "m.csv:2", "forward slashes"]),
        ("m.jsonl", '{"path": "/etc/passwd"}', ["'/etc/passwd'", "m.jsonl:1"]),
        ("m.jsonl", '{"path": "a.jpg"}\n{"path": 3}', ["line 2", "is not a text"]),
        ("m.jsonl", '{"path": "a.jpg"}\n{"path": ', ["line 2 of the manifest cannot be read"]),
        ("m.jsonl", '["a.jpg"]', ["it is not an object", '{"path": "a.jpg"']),
        ("m.jsonl", '{"file_name": "a.jpg"}', ["only file_name", "rename 'file_name' to `path`"]),
        ("m.jsonl", '{"path": "a.jpg", "file": "b"}', ["'path' and 'file'"]),
        ("m.jsonl", '{"path": "a.jpg", "caption": {"en": "x"}}', ["is {'en': 'x'}", "a list of texts"]),
        ("m.jsonl", "", ["names no pictures"]),
        ("m.parquet", "not one", ["the manifest cannot be read"]),
        ("m.xlsx", "x", [".csv, .tsv, .jsonl"]),
        ("m.csv", 'path,caption\na.jpg,"x', ["manifest is not closed"]),
        ("m.csv", "path,weight\na.jpg,-1", ["a weight of the manifest is '-1'", "m.csv:2", "at least 0"]),
        ("m.csv", "path,weight\na.jpg,0\nsub/b,0", ["have a weight of 0", "m.csv", "above 0"]),
        ("m.csv", "path,weight\na.jpg,nan", ["a weight of the manifest is 'nan'"]),
        ("m.csv", "path,weight,weights\na.jpg,1,2", ["the columns 'weight' and 'weight'"]),
        ("m.jsonl", '{"path": "a.jpg", "weight": true}', ["a weight of the manifest is True"]),
        ("m.jsonl", '{"path": "a.jpg", "weight": 1e999}', ["a weight of the manifest is inf"]),
        ("m.jsonl", '{"path": "a.jpg", "weight": [1]}', ["a weight of the manifest is [1]"]),
        (
            "m.csv",
            "path,weight\na.jpg,1\na.jpg,2",
            ["gives a.jpg the weights 1.0 and 2.0", "m.csv:3", "one weight"],
        ),
        ("m.csv", "path,mask\na.jpg,../m.png", ["'../m.png'", "m.csv:2"]),
    ],
)
def test_mistakes_are_one_message(
    folder: Path, tmp_path: Path, name: str, text: str, said: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        list_images(DataSource(path=folder, manifest=tmp_path / name), "x")
    for part in said:
        assert part in str(caught.value)


def test_second_labels_are_warned_of(folder: Path, tmp_path: Path) -> None:
    lines: list[Mapping[str, Any]] = [
        {"path": "a.jpg", "labels": ["temple", "roof"], "price": 2},
        {"path": str(folder / "sub" / "b"), "labels": [7]},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = DataSource(path=folder, manifest=tmp_path / "m.jsonl")
    said = captions_of(source, "x", list_images(source, "x").files)
    assert dict(said.notes) == {"a.jpg": (None, "temple"), "sub/b": (None, "7")}
    assert [warning.what for warning in said.warnings] == [
        "1 row of the manifest give a picture more than one label; its first is used",
    ]


def test_a_dataset_has_one_table(folder: Path) -> None:
    with pytest.raises(ValidationError, match="leave out `captions` or `manifest`"):
        DataSource(path=folder, manifest=Path("m.csv"), captions=Path("c.csv"))


def test_folders_are_labels_where_no_table_gives_one(folder: Path) -> None:
    for name in ("cats/x/1.jpg", "cats/2.jpg", "dogs/3.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name)
    (folder / "captions.csv").write_text("file,label\ndogs/3.jpg,hound")
    plain = DataSource(path=folder)
    source = DataSource(path=folder, labels="folders", captions=Path("captions.csv"))
    listing = list_images(source, "x")
    labels = {file: label for file, (_, label) in captions_of(source, "x", listing.files).notes.items()}
    assert labels == {
        "a.jpg": None,
        "cats/2.jpg": "cats",
        "cats/x/1.jpg": "cats",
        "dogs/3.jpg": "hound",
        "unnamed.jpg": None,
    }
    assert fingerprint(plain) != fingerprint(DataSource(path=folder, labels="folders"))


def test_of_several_captions_each_is_drawn_and_the_index_keeps_them(folder: Path) -> None:
    said = ("one", "two", "three")
    rows = [
        ImageRecord("x", "a.jpg", str(folder), "0" * 64, 120, 90, caption="one", captions=said),
        ImageRecord("x", "sub/b", str(folder), "1" * 64, 120, 90, caption="only"),
    ]
    ImageIndex(rows).save(folder)
    index = ImageIndex.load(folder)
    assert [index[row].captions for row in range(2)] == [said, ()]
    encoded: list[str] = []

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return [1]

    def blocks() -> CaptionBlocks:
        order = SampleOrder({"all": np.arange(2)}, batch_size=2, seed=0)
        return CaptionBlocks(
            index, order, size=16, block_size=2, seed=0, max_unreadable=0, encode=encode, context=4
        )

    for step in range(30):
        blocks().load(step, 0)
    assert set(encoded) == {*said, "only"}
    assert encoded.count("only") == 30
    first = list(encoded)
    encoded.clear()
    for step in range(30):
        blocks().load(step, 0)
    assert encoded == first


def _told(folder: Path, *lines: str) -> Mapping[str, Any]:
    table = folder / "told.jsonl"
    table.write_text("\n".join(lines))
    source = DataSource(path=folder, manifest=table)
    return captions_of(source, "photos", list_images(source, "photos").files).notes


def test_a_later_line_may_have_what_the_first_one_lacks(folder: Path) -> None:
    said = _told(folder, '{"path": "a.jpg"}', '{"path": "sub/b", "caption": "a garden", "label": "garden"}')
    assert said == {"a.jpg": (None, None), "sub/b": ("a garden", "garden")}


def test_whole_numbers_keep_their_figures_and_what_is_not_there_is_no_label(folder: Path) -> None:
    said = _told(
        folder,
        '{"path": "a.jpg", "label": 1234567.0}',
        '{"path": "sub/b", "label": 1234568.0}',
        '{"path": "sub/c.bin", "label": NaN}',
    )
    assert [label for _, label in said.values()] == ["1234567", "1234568", None]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("[" * 100_000, "line 1 of the manifest cannot be read"),
        (r'{"path": "a.jpg", "caption": "\ud800"}', "half a character"),
        ('{"path": "a.jpg", " Path": "sub/b"}', "the columns 'path' and ' Path'"),
    ],
    ids=["deep", "surrogate", "twice"],
)
def test_hostile_lines_are_one_message(folder: Path, line: str, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        _told(folder, line)
    assert error.value.where == f"{folder / 'told.jsonl'}:1"


def test_two_columns_of_one_name_are_one_message(folder: Path) -> None:
    table = folder / "twice.parquet"
    pq.write_table(pa.table([pa.array(["a.jpg"]), pa.array(["sub/b"])], names=["path", "path"]), table)
    with pytest.raises(UserError, match="the columns 'path' and 'path'"):
        list_images(DataSource(path=folder, manifest=table), "photos")


def test_names_that_no_file_can_have_are_left_out_once(folder: Path) -> None:
    table = folder / "m.jsonl"
    table.write_text('{"path": "\\ud800.jpg"}\n{"path": "\\udc80.jpg"}\n{"path": "a.jpg"}\n')
    listing = list_images(DataSource(path=folder, manifest=table), "photos")
    assert listing.files == ("a.jpg",)
    assert [(item.path, item.reason) for item in listing.left_out] == [
        ("\\xed\\xa0\\x80.jpg", "its name is not UTF-8"),
        ("\\x80.jpg", "its name is not UTF-8"),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_drawn_follows_the_weights(folder: Path, tmp_path: Path, name: str) -> None:
    """From each form of a manifest, through the index, to the rows of steps; without a weight it is 1, also of NaN."""
    weights: dict[str, float | None] = {"a.jpg": 2.5, "sub/b": None, "sub/c.bin": 0.25, "unnamed.jpg": 0}
    table = tmp_path / name
    rows = [{"path": path, "weight": weight} for path, weight in weights.items()]
    if table.suffix == ".csv":
        table.write_text("\n".join(["path,weight", *(f"{r['path']},{r['weight'] or ''}" for r in rows[:3])]))
        with table.open("a") as file:
            file.write("\nunnamed.jpg,0\n")
    elif table.suffix == ".jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist([{**row, "weight": row["weight"]} for row in rows]), table)
    source = DataSource(path=folder, manifest=table)
    photos = scan(source, "x")
    statuses, _ = filter_images(photos, {"x": folder}, 0, None, lambda: None)
    ones = np.ones(len(statuses), dtype=np.bool_)
    ImageIndex(index_rows(statuses, np.zeros(len(statuses), np.int64), ones)).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    order = sample_order(index, None, batch_size=5, seed=3)
    drawn = count_draws(index, order, 600)
    wanted = np.array([{"sub/b": 1.0}.get(index[row].path, weights[index[row].path]) for row in range(4)])
    assert np.abs(drawn - 3000 * wanted / wanted.sum()).max() <= 2
    assert [index[row].path for row in order.rows] == ["a.jpg", "sub/b", "sub/c.bin"]
    plain = fingerprint(source)
    table.write_bytes(
        table.read_bytes().replace(b"weight", b"price ") if name == "m.csv" else table.read_bytes()
    )
    assert (fingerprint(source) != plain) == (name == "m.csv")


def test_photos_that_are_all_of_weight_0_are_refused(folder: Path) -> None:
    rows = [ImageRecord("x", "a.jpg", str(folder), "0" * 64, 8, 8, weight=0.0)]
    with pytest.raises(UserError, match="have a weight of 0"):
        sample_order(ImageIndex(rows), None, batch_size=1, seed=0)
