"""A report as one HTML file: style and pictures inside, nothing loaded from anywhere, no script."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

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
    """A PNG file; it is copied into the page. The caption is also what a screen reader says."""

    path: Path
    caption: str


Block = Text | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


def page(title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The whole page. All texts are plain and escaped here; same input, same bytes.

    Raises:
        FileNotFoundError: a picture is not there.
        ValueError: a table's row is not as long as its header, or a picture is no PNG.
    """
    parts = [f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"]
    if tiles:
        parts.append(f'<div class="tiles">{"".join(map(_tile, tiles))}</div>')
    parts += [_section(section) for section in sections]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


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


def _tile(tile: Tile) -> str:
    note = f"<small>{escape(tile.note)}</small>" if tile.note else ""
    return f'<div class="tile"><span>{escape(tile.label)}</span><b>{escape(tile.value)}</b>{note}</div>'


def _section(section: Section) -> str:
    blocks = "\n".join(map(_block, section.blocks))
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return "<p>" + _CODE.sub(r"<code>\1</code>", escape(block.text)) + "</p>"
    if isinstance(block, Table):
        return _table(block)
    return _picture(block)


def _table(table: Table) -> str:
    _check(table)

    def row(cells: Sequence[str], tag: str, css: str = "") -> str:
        texts = (
            f"<{tag}>{escape(cell)}</{tag}>"
            if at < table.num_names
            else f'<{tag} class="n">{escape(cell)}</{tag}>'
            for at, cell in enumerate(cells)
        )
        return f"<tr{css}>{''.join(texts)}</tr>"

    body = "\n".join(
        row(cells, "td", ' class="strong"' if at in table.strong else "")
        for at, cells in enumerate(table.rows)
    )
    head = row(table.header, "th")
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _picture(picture: Picture) -> str:
    data = picture.path.read_bytes()
    if not data.startswith(b"\x89PNG"):
        raise ValueError(f"{picture.path} is no PNG")
    caption = escape(picture.caption)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


_STYLE = """
:root { color-scheme: light; --ink: #1d2430; --soft: #5b6675; --line: #e3e7ec; --page: #f5f7f9;
  --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 20px 64px; }
header h1 { margin: 0; font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; }
header p { margin: 6px 0 24px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.tile, section { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 14px 18px; display: flex; flex-direction: column; border-top: 3px solid var(--blue); }
.tile span { color: var(--soft); font-size: 13px; }
.tile b { font-size: 28px; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile small { color: var(--soft); font-size: 12.5px; }
section { margin-top: 20px; padding: 22px 26px 24px; }
section h2 { margin: 0 0 10px; font-size: 19px; }
section p { max-width: 74ch; margin: 0 0 14px; color: var(--soft); }
code { font-family: ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; font-size: 0.92em; }
.wide { overflow-x: auto; margin-bottom: 16px; }
.wide:last-child { margin-bottom: 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: left; border-bottom: 1px solid var(--line);
  min-width: 13ch; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; font-size: 12.5px; white-space: nowrap; }
th.n, td.n { text-align: right; padding: 6px 0 6px 14px; white-space: nowrap; min-width: 0; }
tbody tr:last-child td { border-bottom: 0; }
tr.strong td { font-weight: 650; background: #f0f7fb; }
figure { margin: 0 0 26px; }
figure:last-child { margin-bottom: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: 6px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
"""
