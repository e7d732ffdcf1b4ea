"""What is found out about a folder of pictures, and that it agrees with what training lists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.data.decode import UnreadableImage, read_header, read_rgb
from orchestrator.data.sources.folder import list_images
from orchestrator.data.sources.survey import folder_labels, survey
from orchestrator.errors import UserError


def picture(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


# --- headers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
def test_a_header_says_what_decoding_finds(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    picture(path, 50, 20)
    found = read_header(path)
    height, width, _ = read_rgb(path).shape
    assert (found.width, found.height, found.bits) == (width, height, 8) == (50, 20, 8)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_more_than_eight_bits_are_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    Image.fromarray(np.full((6, 8), 4000, np.uint16)).save(path)
    assert read_header(path).bits == 16


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, I am a text and no picture at all", "not an image of a known format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "begins like a PNG, but is not one|PNG"),
        (b"II*\0" + bytes(60), "."),
    ],
)
def test_what_has_no_header_is_unreadable(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason):
        read_header(tmp_path / "a.png")


def test_a_header_above_the_limit_is_unreadable(tmp_path: Path) -> None:
    for name in ("a.png", "a.webp"):
        picture(tmp_path / name, 40, 30)
        with pytest.raises(UnreadableImage, match="40 × 30 pixels are more than the limit of 1,000"):
            read_header(tmp_path / name, max_pixels=1000)


# --- folders ----------------------------------------------------------------------------------------------------


def test_counts_sizes_and_what_is_left_out(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / f"{number}.png", 100 + number, 50 + number)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "b.png").write_bytes(b"no picture")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(3 << 30)
    found = survey(tmp_path)
    assert found.num_pictures == 11
    assert (found.sides, found.side) == (tuple(range(50, 60)), 55)
    assert found.unreadable == (
        ("b.png", "not an image of a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF, JPEG2000, AVIF)"),
    )
    assert sorted(found.left_out) == [
        "3,221,225,472 bytes are more than 120,000,000 pixels take",
        "its name ends in .txt",
    ]
    assert found.listing == list_images(found.source, "any")


def test_a_table_of_captions_is_found_and_taken(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "sub" / f"{number}.png")
    (tmp_path / "aaa.csv").write_text("price,weight\n1,2\n")
    (tmp_path / "my.csv").write_text("file,label\nsub/0.png,x\nsub/1.png,x\nsub/2.png,y\n")
    found = survey(tmp_path)
    assert found.source.captions == tmp_path / "my.csv"
    assert found.labels == {"sub/0.png": "x", "sub/1.png": "x", "sub/2.png": "y"}
    assert found.left_out == {"its name ends in .csv": 1}, "the table in use is not left out"
    (tmp_path / "captions.csv").write_text("file,caption\nsub/3.png,a red dot\n")
    found = survey(tmp_path)
    assert found.source.captions == tmp_path / "captions.csv", "the likelier name comes first"
    assert (found.captions.num_captions, found.captions.num_labels, found.labels) == (1, 0, {})


def test_a_table_that_cannot_be_used_is_told_and_left(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "captions.csv").write_text("filename,text\na.png,x\n")
    found = survey(tmp_path)
    assert found.source.captions is None
    assert found.table_error is not None
    assert "has no `file` column" in str(found.table_error)


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"], "cat cat dog dog"),
        (["train/cat/1.jpg", "test/cat/1.jpg", "train/dog/1.jpg", "test/dog/1.jpg"], "cat cat dog dog"),
        (["0/1.jpg", "0/2.jpg", "1/1.jpg", "1/2.jpg"], "0 0 1 1"),
        (["pets/cat/1.jpg", "pets/cat/2.jpg", "pets/dog/1.jpg", "pets/dog/2.jpg"], "cat cat dog dog"),
        (["cat/tom/1.jpg", "cat/tim/2.jpg", "dog/bo/1.jpg", "dog/2.jpg"], "cat cat dog dog"),
        (["a.jpg", "b.jpg"], ""),
        (["train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg"], ""),
        (["2021/05/1.jpg", "2021/05/2.jpg", "2022/06/1.jpg", "2022/06/2.jpg"], ""),
        (["2021-05-03/1.jpg", "2021-05-03/2.jpg", "2022/1.jpg", "2022/2.jpg"], ""),
        (["DCIM/100CANON/1.jpg", "DCIM/100CANON/2.jpg", "DCIM/101CANON/1.jpg", "DCIM/101CANON/2.jpg"], ""),
        (["all/cat/1.jpg", "all/cat/2.jpg"], ""),
        ([f"{number}/a.jpg" for number in range(9)], ""),
        (["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg", "a.jpg", "b.jpg"], ""),
    ],
    ids=["plain", "parts above", "numbers", "shared above", "below", "flat", "parts", "years", "dates", "camera", "one",
         "ids", "mixed"],
)  # fmt: skip
def test_which_folders_are_labels(files: Sequence[str], labels: str) -> None:
    assert list(folder_labels(files).values()) == labels.split()


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as raised:
        survey(tmp_path / "none")
    assert "dataset" not in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there are no images in"):
        survey(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of the 1 pictures that were looked at"):
        survey(tmp_path / "empty")


@pytest.mark.parametrize(("top", "white"), [(3000, 4095), (200, 255), (60000, None)])
def test_which_values_files_of_sixteen_bits_use_is_found(tmp_path: Path, top: int, white: int | None) -> None:
    for number in range(3):
        values = np.full((30, 40), top // 2, np.uint16)
        values[number, 0] = top
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    picture(tmp_path / "eight.png", 40, 30)
    found = survey(tmp_path)
    assert (found.deep, found.white) == (3, white)
