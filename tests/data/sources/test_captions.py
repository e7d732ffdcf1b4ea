"""A captions file as people write it: what is read, what is told, and that a plain one is read as it always was."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path

import pytest

from orchestrator.config.schema import DataSource
from orchestrator.data.sources.captions import Captions, read, reads_as_before
from orchestrator.data.sources.folder import fingerprint
from orchestrator.errors import UserError

FILES = ["a.jpg", "sub/b.jpg", unicodedata.normalize("NFC", "käse.jpg")]
RIGHT = {"a.jpg": ("Beans, green", "Veg"), "sub/b.jpg": ("Rice", None)}


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "c.csv"
    path.write_bytes(text.encode(encoding))
    return path


def captions(folder: Path, text: str, encoding: str = "utf-8") -> Captions:
    return read(write(folder, text, encoding), folder / "photos", FILES)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ('file,caption,label\na.jpg,"Beans, green",Veg\nsub/b.jpg,Rice,\n', "utf-8"),
        ('file,caption,label\r\na.jpg,"Beans, green",Veg\r\nsub/b.jpg,Rice,\r\n', "utf-8-sig"),
        ("file;caption;label\na.jpg;Beans, green;Veg\nsub/b.jpg;Rice;\n", "utf-8-sig"),
        ("file\tcaption\tlabel\na.jpg\tBeans, green\tVeg\nsub/b.jpg\tRice\t\n", "utf-8"),
        ('file, caption, label\na.jpg, "Beans, green", Veg\nsub/b.jpg, Rice,\n', "utf-8"),
        ('File,Caption ,LABEL\na.jpg,"Beans, green",Veg\nsub/b.jpg,Rice,\n', "utf-8"),
        ('label,file,caption\nVeg,./a.jpg,"Beans, green"\n,sub//b.jpg,Rice\n', "utf-8"),
        ('file,caption,label\n{root}/a.jpg,"Beans, green",Veg\n{root}/sub/b.jpg,Rice,\n', "utf-8"),
        (
            'file,caption,label\na.jpg,"Beans, green",Veg\na.jpg,"Beans, green",Veg\n\n,,\nsub/b.jpg,Rice,\n',
            "utf-8",
        ),
    ],
    ids=["plain", "BOM", "semicolons", "tabs", "spaces", "capitals", "./", "absolute", "row twice"],
)
def test_all_ways_to_write_it_say_the_same(tmp_path: Path, text: str, encoding: str) -> None:
    found = captions(tmp_path, text.replace("{root}", str(tmp_path / "photos")), encoding)
    assert (found.notes, found.warnings) == (RIGHT, ())
    assert (found.num_captions, found.num_labels) == (2, 1)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_another_unicode_form_is_the_same_name(tmp_path: Path, form: str) -> None:
    name = unicodedata.normalize(form, "käse.jpg")  # type: ignore[arg-type]
    assert captions(tmp_path, f"file,caption\n{name},Cheese\n").notes == {FILES[2]: ("Cheese", None)}


def test_values_of_a_plain_file_are_not_touched(tmp_path: Path) -> None:
    assert captions(tmp_path, 'file,caption\na.jpg, "x\n').notes == {"a.jpg": (' "x', None)}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "file,caption\na.jpg,x\na.jpg,y\n",
            ["1 photo has different rows", "a.jpg", "last row is used", "c.csv:3"],
        ),
        ("file,caption\na.jpg,x\n./a.jpg,y\n", ["1 photo has different rows", "c.csv:3"]),
        (
            "file,caption\na.jpg,black, seed\n",
            ["1 row of", "more values than the 2 columns", "c.csv:2", "quotes"],
        ),
        ("file,captions\na.jpg,x\n", ["column 'captions'", "not read", "'caption'", "c.csv:1"]),
        ("file;caption;category\na.jpg;x;y\n", ["column 'category'", "not read", "'label'", "c.csv:1"]),
    ],
    ids=["two captions", "two names", "comma", "column", "synonym"],
)
def test_what_is_probably_not_meant_is_told(tmp_path: Path, text: str, parts: list[str]) -> None:
    (warning,) = captions(tmp_path, text).warnings
    assert not [part for part in parts if part not in str(warning)], warning


def test_of_two_captions_the_last_counts(tmp_path: Path) -> None:
    assert captions(tmp_path, "file,caption\na.jpg,x\na.jpg,y\n").notes == {"a.jpg": ("y", None)}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "file,caption\n/old/b.jpg,x\nq.jpg,y\n",
            ["none of the names", "2 files", "c.csv:2", "line 2", "'sub/b.jpg'"],
        ),
        ("file,caption\na.jpg,x\nA.jpg,y\n", ["names 1 file", "A.jpg", "c.csv:3", "did you mean 'a.jpg'"]),
        ("file,caption\na.jpeg,x\n", ["did you mean 'a.jpg'"]),
        ("file,caption\n../a.jpg,x\n", ["none of the names"]),
        ("fil;caption\na.jpg;x\n", ["no `file` column"]),
        (
            "filename;text;class\na.jpg;x;y\n",
            ["only filename, text, class", "rename the column 'filename' to"],
        ),
        ("file,caption,caption\na.jpg,x,y\n", ["more than one `caption` column", "c.csv:1", "all but one"]),
        ("File;file\na.jpg;a.jpg\n", ["more than one `file` column"]),
    ],
    ids=["none", "one", "ending", "outside", "column", "synonym", "column twice", "capital twice"],
)
def test_names_without_a_photo_get_the_nearest(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        captions(tmp_path, text)
    assert not [part for part in parts if part not in str(caught.value)], caught.value


def test_only_a_header_that_was_read_otherwise_changes_the_key(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(b"a")
    source = DataSource(path=photos, captions=write(tmp_path, "file,caption\na.jpg,x\n"))
    # What versions before this reader made of these very files.
    assert fingerprint(source) == "30d8cdba34f61dd59caea4a02bc04175b277cf8bd51fe0f790fda688e6d78ff1"
    assert reads_as_before(tmp_path / "c.csv")
    write(tmp_path, "file, caption\na.jpg, x\n")
    assert fingerprint(source) != "a0548c191fe2fafc682cd756d3c7fa95e82a773a0dc93140c9b8f66c3657b1ec"
    assert not reads_as_before(tmp_path / "c.csv")


def test_a_header_of_very_many_columns_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(",".join(["file", *(f"captoin{number}" for number in range(50_000))]) + "\n")
    started = time.monotonic()
    with pytest.raises(UserError, match="50,001 columns, more than 1,000"):
        read(path, tmp_path, ["a.jpg"])
    assert time.monotonic() - started < 5


def test_a_quote_that_is_not_closed_is_a_warning_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text('file,caption\na.jpg,"a cat\nb.jpg,a "dog\n')
    (warning,) = read(path, tmp_path, ["a.jpg", "b.jpg"]).warnings
    assert "a quote is probably not closed" in str(warning)
    assert "line 3" in str(warning)
    path.write_text('file,caption\na.jpg,"a cat,\nand a dog, too"\n')
    assert not read(path, tmp_path, ["a.jpg", "b.jpg"]).warnings


def test_a_value_that_is_too_long_is_an_error_with_the_line_it_begins_on(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text('file,caption\na.jpg,a cat\nb.jpg,"a dog' + "\nmore" * 40_000)
    with pytest.raises(UserError) as raised:
        read(path, tmp_path, ["a.jpg", "b.jpg"])
    assert "captions.csv:3" in str(raised.value)
    assert "close every quote" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('file,caption\na.jpg,a cat\nb.jpg,"a dog\n', ["quote in the last row", ".csv:3"]),
        ('file,caption\na.jpg,a cat\nb.jpg,"a dog', ["quote in the last row", ".csv:3"]),
        ('file,caption\na.jpg,"a cat\nb.jpg,a dog\n', ["quote in the last row", ".csv:2"]),
        ('file;caption\na.jpg;"a cat""\n', ["quote in the last row", ".csv:2"]),
        ('file,"caption\na.jpg,a cat\n', ["quote in the last row", ".csv:1"]),
        ("file,caption\na.jpg,a cat\nb.jpg,a\0dog\n", ["NUL character", "line 3"]),
        ("file,caption,label\na.jpg,a cat,\0\n", ["NUL character", "line 2"]),
    ],
    ids=["last", "no line end", "over rows", "doubled", "header", "NUL caption", "NUL label"],
)
def test_what_no_text_is_has_its_row_named(tmp_path: Path, text: str, said: list[str]) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path, tmp_path, ["a.jpg", "b.jpg"])
    assert not [part for part in said if part not in str(caught.value)], caught.value


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_closed_quotes_in_the_last_row_are_read(tmp_path: Path, end: str) -> None:
    path = tmp_path / "captions.csv"
    path.write_text(f'file,caption\na.jpg,"a ""cat"""{end}', newline="")
    assert read(path, tmp_path, ["a.jpg"]).notes == {"a.jpg": ('a "cat"', None)}


def test_a_captions_file_that_nobody_wrote_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("file,caption\n")
    os.truncate(path, 300 << 30)
    with pytest.raises(UserError, match="322,122,547,200 bytes, more than"):
        read(path, tmp_path, ["a.jpg"])
    os.truncate(path, 64 << 20)
    with pytest.raises(UserError, match=r"a line of the captions file has more than 16,777,216 characters"):
        read(path, tmp_path, ["a.jpg"])
