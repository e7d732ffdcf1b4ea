from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from orchestrator.evaluation.report.html import Picture, Section, Table, Text, Tile, markdown_table, page

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Reader(HTMLParser):
    """Texts by tag, attributes, and whether every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dot.png"
    path.write_bytes(PNG)
    return path


def test_page_holds_everything_and_loads_nothing(picture: Path) -> None:
    table = Table(("name", "value"), [("a", "1"), ("b", "2")], strong=[1])
    sections = [
        Section("First", [Text("Some words."), table]),
        Section("Second", [Picture(picture, "a dot")]),
    ]
    text = page("Title", "below it", [Tile("figure", "0.5", "of something")], sections)
    reader = read(text)
    for tag, wanted in [
        ("h1", "Title"),
        ("b", "0.5"),
        ("small", "of something"),
        ("h2", "First"),
        ("p", "Some words."),
        ("th", "value"),
        ("td", "2"),
        ("figcaption", "a dot"),
    ]:
        assert (tag, wanted) in reader.texts
    (source,) = [value for tag, name, value in reader.attributes if name == "src"]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == PNG
    assert [value for tag, name, value in reader.attributes if name == "class" and tag == "tr"] == ["strong"]
    assert not [name for _, name, _ in reader.attributes if name == "href"]
    assert not re.search(r"https?://|<script|@import|url\(", text)


def test_texts_are_escaped() -> None:
    nasty = '<script>alert("1")</script> & more'
    table = Table((nasty, "x"), [(nasty, nasty)])
    text = page(nasty, nasty, [Tile(nasty, nasty, nasty)], [Section(nasty, [Text(nasty), table])])
    assert "<script" not in text
    # Twice the title, once each of the other nine.
    assert [found for _, found in read(text).texts].count(nasty) == 11


def test_names_stand_left_and_figures_right() -> None:
    text = page("t", "s", [], [Section("x", [Table(("a", "b", "c"), [("1", "2", "3")], num_names=2)])])
    assert re.findall(r'<td( class="n")?>(\d)</td>', text) == [("", "1"), ("", "2"), (' class="n"', "3")]


def test_wrong_tables_and_pictures_are_refused(tmp_path: Path) -> None:
    ragged = Table(("a", "b"), [("1",)])
    with pytest.raises(ValueError, match="1 cells below a header of 2"):
        page("t", "s", [], [Section("x", [ragged])])
    with pytest.raises(ValueError, match="1 cells"):
        markdown_table(ragged)
    (tmp_path / "no.png").write_bytes(b"<svg/>")
    with pytest.raises(ValueError, match=r"no\.png is not a PNG"):
        page("t", "s", [], [Section("x", [Picture(tmp_path / "no.png", "")])])
    with pytest.raises(FileNotFoundError):
        page("t", "s", [], [Section("x", [Picture(tmp_path / "none.png", "")])])


def test_markdown_table() -> None:
    table = Table(("name", "n"), [("a|b", "1"), ("plain", "22")], strong=[1])
    assert markdown_table(table) == (
        "| name      |      n |\n| --------- | -----: |\n| a\\|b      |      1 |\n| **plain** | **22** |\n"
    )


def test_a_paragraph_sets_what_stands_between_backticks_as_code() -> None:
    text = page("t", "s", [], [Section("One", [Text("Set `a<b` and `mix`, or a ` alone.")])])
    assert "<p>Set <code>a&lt;b</code> and <code>mix</code>, or a ` alone.</p>" in text
