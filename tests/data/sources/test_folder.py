"""Scanning: every file accounted for, every mistake named."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.config.schema import DataSource
from orchestrator.data.sources.folder import fingerprint
from orchestrator.data.sources.scan import scan
from orchestrator.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    (photos / ".hidden").mkdir()
    rng = np.random.default_rng(0)
    for name in ("b.jpg", "sub/a.PNG", ".hidden/x.jpg", ".y.jpg"):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(photos / name)
    (photos / "notes.txt").write_text("no picture")
    (photos / "broken.jpg").write_bytes((photos / "b.jpg").read_bytes()[:300])
    (photos / "captions.csv").write_text(
        'file,caption,label\nb.jpg,"Beans, green",Veg\nsub/a.PNG,,Fruit\n', encoding="utf-8-sig"
    )
    return photos


def test_scan(folder: Path) -> None:
    photos = scan(DataSource(path=folder, captions=folder / "captions.csv"), "food")
    assert [photo.path for photo in photos] == ["b.jpg", "broken.jpg", "sub/a.PNG"]
    first, broken, last = photos
    assert (first.source, first.width, first.height, first.error) == ("food", 30, 20, None)
    assert (first.caption, first.label) == ("Beans, green", "Veg")
    assert (last.caption, last.label) == (None, "Fruit")
    data = (folder / "b.jpg").read_bytes()
    assert (first.sha256, first.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert (broken.width, broken.height) == (0, 0)
    assert "corrupt JPEG" in str(broken.error)


def test_captions_may_lie_inside_the_folder(folder: Path) -> None:
    photos = scan(DataSource(path=folder, captions=Path("captions.csv")), "food")
    assert photos[0].label == "Veg"


def test_without_captions_there_are_none(folder: Path) -> None:
    assert {(photo.caption, photo.label) for photo in scan(DataSource(path=folder), "food")} == {(None, None)}


def _mistake(source: DataSource) -> str:
    with pytest.raises(UserError) as raised:
        scan(source, "food")
    return str(raised.value)


def test_folder_mistakes(folder: Path, tmp_path: Path) -> None:
    assert re.search(
        r"nowhere.*'food' does not exist\n.*data\.food\.path", _mistake(DataSource(path=tmp_path / "nowhere"))
    )
    assert "is not a folder" in _mistake(DataSource(path=folder / "b.jpg"))
    (tmp_path / "empty").mkdir()
    assert "there are no images" in _mistake(DataSource(path=tmp_path / "empty"))


def test_captions_mistakes(folder: Path, tmp_path: Path) -> None:
    def captions(text: str) -> DataSource:
        (tmp_path / "c.csv").write_bytes(text.encode("latin-1"))
        return DataSource(path=folder, captions=tmp_path / "c.csv")

    assert "'food' does not exist" in _mistake(DataSource(path=folder, captions=Path("none.csv")))
    assert "no `file` column, only files, caption\n" in _mistake(captions("files,caption\nb.jpg,x\n"))
    assert "rename the column 'files'" in _mistake(captions("files,caption\nb.jpg,x\n"))
    assert "only nothing" in _mistake(captions(""))
    assert "not UTF-8" in _mistake(captions("file,caption\nb.jpg,Käse\n"))
    missing = _mistake(captions("file\n" + "\n".join(["b.jpg", "q4.jpg", "q1.jpg", "q3.jpg", "q2.jpg"])))
    assert "names 4 files" in missing
    assert "q1.jpg, q2.jpg, q3.jpg\n" in missing


def test_fingerprint_follows_content_only(folder: Path, tmp_path: Path) -> None:
    source = DataSource(path=folder, captions=Path("captions.csv"))
    first = fingerprint(source)
    os.utime(folder / "b.jpg", (0, 0))
    (folder / "notes.txt").write_text("changed")
    assert fingerprint(source) == first
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(DataSource(path=tmp_path / "elsewhere", captions=Path("captions.csv"))) == first

    seen = {first, fingerprint(DataSource(path=folder))}
    data = bytearray((folder / "b.jpg").read_bytes())
    data[-5] ^= 1
    (folder / "b.jpg").write_bytes(data)
    seen.add(fingerprint(source))
    (folder / "b.jpg").rename(folder / "c.jpg")
    seen.add(fingerprint(source))
    (folder / "captions.csv").write_text("file,caption\n")
    seen.add(fingerprint(source))
    assert len(seen) == 5
