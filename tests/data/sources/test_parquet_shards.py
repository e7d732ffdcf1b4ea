"""Pictures in Parquet files, in the forms in which data sets have them."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import S3Server
from sklearn.datasets import load_sample_image

from orchestrator.config.schema import DataSource
from orchestrator.data.decode import UnreadableImage, read_rgb
from orchestrator.data.sources import parquet_shards
from orchestrator.data.sources.folder import fingerprint, list_images
from orchestrator.data.sources.scan import scan

PHOTO = load_sample_image("flower.jpg")
COUNT = 23


def _jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO[8 * number : 8 * number + 60, :90]).save(file, "JPEG")
    return file.getvalue()


def _as_datasets_writes(path: Path) -> None:
    """Struct of bytes and path, numbered classes with their names in the metadata, several row groups."""
    rows = [
        {"image": {"bytes": _jpeg(n), "path": f"{n:03}.jpg"}, "label": n % 2, "text": f"photo {n}"}
        for n in range(COUNT)
    ]
    features = {"label": {"names": ["rose", "daisy"], "_type": "ClassLabel"}}
    table = pa.Table.from_pylist(rows)
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(told), path, row_group_size=5)


def _flat(path: Path) -> None:
    """A column of bytes, one of names, labels as texts."""
    rows = [
        {"jpg": _jpeg(n), "key": f"{n:03}.jpg", "cls": ["rose", "daisy"][n % 2], "caption": f"photo {n}"}
        for n in range(COUNT)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, compression="zstd")


@pytest.mark.parametrize("write", [_as_datasets_writes, _flat])
def test_each_row_is_a_picture_with_what_is_said_of_it(tmp_path: Path, write: Any) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.parquet")
    (tmp_path / "readme.md").touch()
    source = DataSource(path=tmp_path, shards="parquet")
    listing = list_images(source, "x")
    photos = {photo.path.rpartition("::")[2]: photo for photo in scan(source, "x", listing)}
    assert len(photos) == COUNT
    for number in range(COUNT):
        photo = photos[f"{number:03}.jpg"]
        assert photo.sha256 == hashlib.sha256(_jpeg(number)).hexdigest()
        assert (photo.caption, photo.label) == (f"photo {number}", ["rose", "daisy"][number % 2])
        with Image.open(io.BytesIO(_jpeg(number))) as image:
            assert np.array_equal(read_rgb(tmp_path / photo.path), np.asarray(image))
    first = fingerprint(source)
    write(tmp_path / "b.parquet")
    assert fingerprint(source) != first


def test_rows_without_a_name_have_a_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [_jpeg(0), _jpeg(1)]}), tmp_path / "a.parquet")
    files = list_images(DataSource(path=tmp_path, shards="parquet"), "x").files
    assert files == ("a.parquet::0:0::row 0", "a.parquet::0:1::row 1")


def test_what_is_no_picture_is_a_reason(tmp_path: Path) -> None:
    _flat(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"a": [1], "b": ["text"]}), tmp_path / "table.parquet")
    pq.write_table(pa.table({"image": pa.array([_jpeg(0), None, b"no picture"])}), tmp_path / "holes.parquet")
    source = DataSource(path=tmp_path, shards="parquet")
    listing = list_images(source, "x")
    reasons = {item.path: item.reason for item in listing.left_out}
    assert "no shard that can be read" in reasons["bad.parquet"]
    assert "no column of image bytes; its columns are a, b" in reasons["table.parquet"]
    errors = [photo.error for photo in scan(source, "x", listing) if photo.path.startswith("holes")]
    assert errors[0] is None
    assert "no image bytes" in str(errors[1])
    assert "not an image" in str(errors[2])
    for name in ("good.parquet::0:99::x", "good.parquet::7:0::x"):
        with pytest.raises(UnreadableImage):
            read_rgb(tmp_path / name)


def test_memory_is_bounded_and_threads_see_the_right_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_datasets_writes(tmp_path / "a.parquet")
    kept = parquet_shards._Groups(12_000)
    monkeypatch.setattr(parquet_shards, "_groups", kept)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, COUNT, 60):
            if parquet_shards.picture(tmp_path / "a.parquet", number // 5, number % 5) != _jpeg(int(number)):
                wrong.append(int(number))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert kept._used == sum(column.nbytes for column in kept._kept.values())
    assert kept._used <= 12_000 or len(kept._kept) == 1


def test_in_a_bucket_only_what_is_asked_for_is_read(s3: S3Server, s3_uri: str, tmp_path: Path) -> None:
    _as_datasets_writes(tmp_path / "a.parquet")
    key = f"{s3_uri.removeprefix('s3://tests/')}/a.parquet"
    s3.client().put_object(Bucket="tests", Key=key, Body=(tmp_path / "a.parquet").read_bytes())
    source = DataSource.model_validate({"path": s3_uri, "shards": "parquet"})
    listing = list_images(source, "x")
    assert listing.files == list_images(DataSource(path=tmp_path, shards="parquet"), "x").files
    assert [photo.sha256 for photo in scan(source, "x", listing)] == [
        photo.sha256 for photo in scan(DataSource(path=tmp_path, shards="parquet"), "x")
    ]


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("captions", [["a leaf", "an oak"], None], [("a leaf", None), (None, None)]),
        ("label", [1234567.0, None], [(None, "1234567"), (None, None)]),
        ("label", [True, False], [(None, "True"), (None, "False")]),
    ],
)
def test_texts_are_taken_from_lists_and_numbers_too(
    tmp_path: Path, column: str, values: list[Any], said: list[tuple[str | None, str | None]]
) -> None:
    pq.write_table(pa.table({"image": [_jpeg(0), _jpeg(1)], column: values}), tmp_path / "a.parquet")
    photos = scan(DataSource(path=tmp_path, shards="parquet"), "x")
    assert [(photo.caption, photo.label) for photo in photos] == said


@pytest.mark.parametrize("name", ["../../x.jpg", "/etc/passwd", "a\nb.jpg", "a\0.jpg", ""])
def test_names_that_lead_elsewhere_are_not_kept(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"image": [_jpeg(0)], "path": [name]}), tmp_path / "a.parquet")
    (photo,) = scan(DataSource(path=tmp_path, shards="parquet"), "x")
    assert (photo.path, photo.error) == ("a.parquet::0:0::row 0", None)


def test_a_name_may_look_like_a_place_in_a_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [_jpeg(0)], "path": ["b.parquet::7:7::x.jpg"]}), tmp_path / "a.parquet")
    (photo,) = scan(DataSource(path=tmp_path, shards="parquet"), "x")
    assert photo.error is None


def test_a_file_whose_rows_are_damaged_counts_as_the_rows_that_its_foot_says(tmp_path: Path) -> None:
    _flat(tmp_path / "good.parquet")
    rows = {"caption": [f"caption {n}" for n in range(9)], "image": [_jpeg(n % 3) for n in range(9)]}
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=3)
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
    with path.open("r+b") as raw:
        raw.seek(column.dictionary_page_offset or column.data_page_offset)
        raw.write(b"\xff" * column.total_compressed_size)
    listing = list_images(DataSource(path=tmp_path, shards="parquet"), "x")
    (found,) = listing.left_out
    assert (found.path, found.kind, found.pictures) == ("damaged.parquet", "unreadable shard", 9)
    assert found.reason.endswith("it has 9 pictures")
    assert listing.account("x").lost == 9
