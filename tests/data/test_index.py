"""The photo index: what is saved is what is loaded."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
