"""A report as one HTML file: style and pictures inside, nothing loaded from anywhere, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TEMPLATE = Path(__file__).with_name("page.html.j2")
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Tile:
    """One figure to read from afar."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph; what stands between backticks is set as code."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text. The first `num_names` columns are names; the others are figures and stand to the right.

    `strong` are the numbers of rows to bring out.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file; it is copied into the page.

    A picture with a title in it needs no caption. `alt` is what a screen reader says; without it, the caption is.
    """

    path: Path
    caption: str = ""
    alt: str = ""


SectionPart = Text | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[SectionPart]


def page(title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The whole page. All texts are plain and escaped by the template; same input, same bytes.

    Raises:
        FileNotFoundError: a picture is not there.
        ValueError: a table's row is not as long as its header, or a picture is not a PNG.
    """
    from jinja2 import Environment, StrictUndefined

    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Table):
            _check(block)
    environment = Environment(
        autoescape=True, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"parts": _parts, "png": _png}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, subtitle=subtitle, tiles=tiles, sections=sections)


def markdown_table(table: Table) -> str:
    """The table in GitHub's Markdown, with aligned source; strong rows in bold.

    Raises:
        ValueError: a row is not as long as the header.
    """
    _check(table)
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    for at in table.strong:
        rows[at] = [f"**{cell}**" if cell else cell for cell in rows[at]]
    header = [_markdown_cell(cell) for cell in table.header]
    widths = [max(3, *(len(row[at]) for row in [header, *rows])) for at in range(len(header))]
    rule = [
        "-" * width if at < table.num_names else "-" * (width - 1) + ":" for at, width in enumerate(widths)
    ]
    lines = []
    for row in [header, rule, *rows]:
        cells = [
            cell.ljust(width) if at < table.num_names else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _check(table: Table) -> None:
    for row in table.rows:
        if len(row) != len(table.header):
            raise ValueError(f"a row of {len(row)} cells below a header of {len(table.header)}: {row}")


def _parts(text: str) -> list[str]:
    """The text, cut at its backticks: every other part stood between two of them."""
    return _CODE.split(text)


def _png(picture: Picture) -> str:
    data = picture.path.read_bytes()
    if not data.startswith(b"\x89PNG"):
        raise ValueError(f"{picture.path} is not a PNG")
    return base64.b64encode(data).decode()
