"""Every file of a dataset is accounted for, and many that would be lost are a question."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from orchestrator.config.schema import DataSource
from orchestrator.data import image_formats
from orchestrator.data.decode import UnreadableImage, read_header, read_rgb
from orchestrator.data.sources import account as accounts
from orchestrator.data.sources.folder import list_images
from orchestrator.data.sources.scan import scan


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photograph, 640 × 427."""
    return Image.fromarray(load_sample_image("china.jpg"))


def _nasty(folder: Path, photo: Image.Image) -> Path:
    """Six JPEGs beside formats of other devices, files without an ending, texts, links and damage."""
    folder.mkdir()
    for number in range(6):
        photo.rotate(number).resize((96, 64)).save(folder / f"{number}.jpg")
    photo.resize((96, 64)).save(folder / "p.avif")
    photo.resize((96, 64)).save(folder / "p.jp2")
    photo.resize((96, 64)).save(folder / "noending", "JPEG")
    (folder / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "notes.txt").write_text("kept beside the pictures")
    (folder / ".thumb.jpg").write_bytes(b"")
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe")
    (folder / "half.jpg").write_bytes((folder / "0.jpg").read_bytes()[:700])
    (folder / "again").symlink_to(folder)
    return folder


def test_each_file_below_a_folder_is_counted_once_by_what_became_of_it(
    photo: Image.Image, tmp_path: Path
) -> None:
    source = DataSource(path=_nasty(tmp_path / "photos", photo))
    listing = list_images(source, "photos")
    photos = scan(source, "photos", listing)
    files = [(one.path, one.error_kind or accounts.TAKEN, one.error or "", 1) for one in photos]
    files += [(one.path, one.kind, one.reason, 1) for one in listing.left_out]
    found = accounts.account("photos", files)
    # What a program that knows nothing of this counts.
    listed = subprocess.run(["find", ".", "-mindepth", "1"], cwd=source.path, capture_output=True, check=True)
    assert found.files == len(listed.stdout.splitlines()) == 15
    assert (found.taken, found.by_kind) == (
        8,
        {
            "ending": 2,
            "not a picture": 1,
            "damaged": 1,
            "linked folder": 1,
            "other data": 1,
            "hidden": 1,
        },
    )
    assert found.lost_share == pytest.approx(4 / 12)
    assert found.summary().startswith("2 ending (none 1, .dcm 1), 1 not a picture, 1 damaged")
    assert found.examples["damaged"] == ("half.jpg",)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    found = accounts.Account("a", 3, {"ending": {"its name ends in .heic": 2}, "hidden": {"hidden": 1}})
    other = accounts.Account("b", 0)
    accounts.save([found, other], tmp_path)
    assert accounts.load(tmp_path) == [found, other]
    assert accounts.load(tmp_path / "elsewhere") == []
    assert accounts.table([found, other]) == [
        "dataset  files  taken  left out",
        "a            6      3  2 ending (.heic 2), 1 hidden",
        "b            0      0  nothing",
    ]


@pytest.mark.parametrize(
    ("left_out", "limit", "asks"),
    [
        ({"ending": {"its name ends in .heic": 2}}, 0.1, True),
        ({"ending": {"its name ends in .heic": 2}}, 0.2, False),
        ({"ending": {"its name ends in .heic": 2}}, 0.19, True),
        ({"other data": {"its name ends in .txt": 90}, "hidden": {"hidden": 50}}, 0.0, False),
        ({"duplicate": {"the same bytes": 90}, "near duplicate": {"nearly": 9}}, 0.0, False),
        ({"damaged": {"corrupt": 1}}, 0.0, True),
        ({}, 0.0, False),
    ],
)
def test_more_than_a_share_that_is_lost_is_a_question(
    left_out: dict[str, dict[str, int]], limit: float, asks: bool
) -> None:
    error = accounts.lost_too_many(accounts.Account("a", 8, left_out), limit, "p.yaml:3")
    assert (error is not None) == asks
    if error is not None and ".heic" in str(error):
        assert "2 of the files of dataset 'a' would be left out, 20 % of what may be pictures" in str(error)
        assert "`max_left_out: 0.2`" in str(error)
        assert "[heic]" in str(error)


def test_a_way_out_is_told_for_files_without_an_ending() -> None:
    found = accounts.Account("a", 1, {"ending": {accounts.NO_ENDING: 5, "its name ends in .dcm": 1}})
    error = accounts.lost_too_many(found, 0.1, "p.yaml:3")
    assert error is not None
    assert "a `manifest` takes pictures without an ending" in str(error)
    assert "pillow-heif" not in str(error)


@pytest.mark.parametrize("ending", ["avif", "jp2", "j2k"])
def test_formats_of_new_devices_are_decoded_as_pillow_does(
    photo: Image.Image, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"p.{ending}"
    photo.save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(read_rgb(path), expected)
    header = read_header(path)
    assert (header.width, header.height) == photo.size
    with pytest.raises(UnreadableImage, match="more than the limit") as caught:
        read_rgb(path, max_pixels=1000)
    assert caught.value.kind == accounts.TOO_LARGE


def test_a_heic_is_left_out_or_unreadable_with_the_package_that_reads_it(tmp_path: Path) -> None:
    if "HEIF" in image_formats.readable_formats():
        pytest.skip("pillow-heif is installed")
    path = tmp_path / "p.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    with pytest.raises(UnreadableImage, match="install pillow-heif"):
        read_rgb(path)
    assert ".heic" not in image_formats.readable_endings()
