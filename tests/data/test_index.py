"""The photo index: what is saved is what is loaded."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config.pixels import PixelFormat
from orchestrator.data import index_table
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError

_ROWS = [
    ImageRecord("food", "a/b.jpg", "/photos", "ab" * 32, 30, 20, "Grüne Bohnen", "Vegetables", "balanced", 3),
    ImageRecord("food", "c.jpg", "/photos", "cd" * 32, 31, 21, None, None, "pool", 0, "food/a/b.jpg"),
    ImageRecord("food", "d.jpg", "/photos", "ef" * 32, 32, 22, component="balanced"),
]


def test_round_trip(tmp_path: Path) -> None:
    ImageIndex(_ROWS).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    assert [index[i] for i in range(len(index))] == _ROWS
    assert index.path(0) == Path("/photos/a/b.jpg")
    assert index.captions == ["Grüne Bohnen", None, None]
    assert index.labels == ["Vegetables", None, None]
    assert index.components == ["balanced", "pool"]
    assert index.rows_of("balanced").tolist() == [0, 2]
    assert index.rows_of("nothing").tolist() == []

    assert index.clusters.tolist() == [3, 0, -1]
    assert pq.read_table(tmp_path / "index.parquet").column("id").to_pylist() == [0, 1, 2]


def test_sources_and_what_was_chosen() -> None:
    index = ImageIndex([*_ROWS, ImageRecord("web", "e.jpg", "/photos", "01" * 32, 8, 8)])
    assert index.sources == ["food", "web"]
    assert index.rows_from("food").tolist() == [0, 1, 2]
    assert index.rows_from("balanced").tolist() == []
    assert index.chosen == ["all", "balanced"], "a photo that no curation has seen was not left out"


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no photo index here"):
        ImageIndex.load(tmp_path)


def test_foreign_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [0], "path": ["a"]}), tmp_path / "index.parquet")
    with pytest.raises(UserError, match="is missing the columns source, root"):
        ImageIndex.load(tmp_path)


def test_photos_that_were_moved_are_where_the_pipeline_file_says(tmp_path: Path) -> None:
    ImageIndex([*_ROWS, ImageRecord("other", "x.jpg", "/other", "", 1, 1)]).save(tmp_path)
    index = ImageIndex.load(tmp_path, {"food": "/mnt/new", "unused": "/nowhere"})
    assert index.path(0) == Path("/mnt/new/a/b.jpg")
    assert index[0].root == "/mnt/new"
    assert index.path(3) == Path("/other/x.jpg")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "a\0.jpg"])
def test_names_in_an_index_do_not_lead_out_of_the_folder(tmp_path: Path, path: str) -> None:
    ImageIndex([ImageRecord("food", path, "/photos", "", 1, 1)]).save(tmp_path)
    with pytest.raises(UserError, match="names a file outside its folder"):
        ImageIndex.load(tmp_path)


@pytest.mark.parametrize("text", [b"", b"PAR1garbagePAR1", b"\xff" * 100])
def test_a_damaged_table_is_one_message(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "index.parquet").write_bytes(text)
    with pytest.raises(UserError, match="cannot be read") as caught:
        ImageIndex.load(tmp_path)
    assert "\n" not in caught.value.what


def _many(count: int) -> list[ImageRecord]:
    """Rows as a curation of photos from the web makes them: names of usual length, several datasets."""
    rng = random.Random(0)
    return [
        ImageRecord(
            ("web", "birds")[number % 2],
            f"{number % 97:03}/{rng.randrange(16**10):010x}/{number:09}.jpg",
            ("/data/web", "/data/birds")[number % 2],
            hashlib.sha256(b"%d" % number).hexdigest(),
            500,
            375,
            label=f"class {number % 100}" if number % 2 else None,
            component=("balanced", "pool", "retrieved")[number % 3],
            cluster=number % 1000,
            retrieved=number % 3 == 2,
            weight=1.0 + (number % 5 == 0),
        )
        for number in range(count)
    ]


def test_a_mapped_index_is_the_one_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks, from the second opening on, after a change, and without a cache; in 120 bytes a row."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_table, "MAPPED_FROM", 1)
    monkeypatch.setattr(index_table, "_CHUNK_ROWS", 300)
    rows = _many(1000)
    path = ImageIndex(rows, {"web": PixelFormat(range=(0, 4095))}).save(tmp_path)
    saved = path.read_bytes()
    for _ in range(2):
        index = ImageIndex.load(tmp_path, {"birds": "/mnt/birds"})
        (mapped,) = (tmp_path / "cache" / "indexes").iterdir()
        assert index._table.column("path").num_chunks == 4
        for number in (0, 299, 300, 640, 999):
            wanted = replace(rows[number], root="/mnt/birds") if number % 2 else rows[number]
            assert index[number] == wanted
            assert index.path(number) == Path(wanted.root) / wanted.path
        assert index.rows_of("retrieved").tolist() == list(range(2, 1000, 3))
        assert index.rows_of("pool").tolist() == list(range(1, 1000, 3))
        assert index.rows_from("birds").tolist() == list(range(1, 1000, 2))
        assert index.clusters.tolist() == [row.cluster for row in rows]
        assert index.labels == [row.label for row in rows]
        assert index.weights is not None
        assert index.weights.tolist() == [row.weight for row in rows]
        assert index.pixels(0) == PixelFormat(range=(0, 4095))
        assert index.pixels(1) is None
        assert [one.path for one in index] == [row.path for row in rows]
        assert next(iter(index)) == rows[0]
        assert index.num_bytes <= 120 * len(index)
        (tmp_path / "again").mkdir(exist_ok=True)
        assert index.save(tmp_path / "again").stat().st_size
        assert ImageIndex.load(tmp_path / "again")[640] == rows[640]
        for other in set((tmp_path / "cache" / "indexes").iterdir()) - {mapped}:
            other.unlink()
    assert path.read_bytes() == saved
    mapped.write_bytes(b"no columns")
    assert ImageIndex.load(tmp_path)[999] == rows[999]
    ImageIndex(rows[:10]).save(tmp_path)
    assert len(ImageIndex.load(tmp_path)) == 10
    monkeypatch.setenv("ORCHESTRATOR_CACHE", "/proc/none")
    assert ImageIndex.load(tmp_path)[9] == rows[9]


def test_columns_are_mapped_although_another_process_writes_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of its folder may go between the listing and the look at its age."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_table, "MAPPED_FROM", 1)
    folder = tmp_path / "cache" / "indexes"
    folder.mkdir(parents=True)
    (folder / ".draft").symlink_to(folder / "gone")
    ImageIndex(_many(10)).save(tmp_path)
    ImageIndex.load(tmp_path)
    assert list(folder.glob("*.arrow"))


def test_an_index_without_rows_and_rows_that_are_not_there(tmp_path: Path) -> None:
    ImageIndex([]).save(tmp_path)
    index = ImageIndex.load(tmp_path)
    assert (len(index), index.sources, index.components, index.clusters.tolist()) == (0, [], [], [])
    with pytest.raises(IndexError, match="row 3 of 3"):
        ImageIndex(_ROWS)[3]
