"""Tables that fit the terminal: where there is no room, whole columns go, and no word or unit is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Columns of the terminal between two columns of a table.
_GAP = 2
# What the last column needs to be read; less where all its lines are shorter.
_READABLE = 36


@dataclass(frozen=True)
class Rows:
    """A table of stages, runs or settings.

    Attributes:
        columns: their headings. The last column takes the room that the others leave, and wraps.
        expendable: the columns that may be left out, the first to go first. Empty columns go before them.
        rows: one cell a column.
    """

    columns: Sequence[str]
    expendable: Sequence[str]
    rows: list[Sequence[str | Text]] = field(default_factory=list)

    def add(self, *cells: str | Text) -> None:
        """Add one row."""
        self.rows.append(cells)

    def print(self, console: Console) -> None:
        """Print what has room, and name the columns that were left out."""
        columns, left_out = list(self.columns), []
        empty = [column for column in columns if not self._width(column, heading=False)]
        for column in [*empty, *self.expendable]:
            if self._needs(columns) <= console.width:
                break
            if column in columns and len(columns) > 1:
                columns.remove(column)
                left_out += [] if column in empty else [column]
        table = stage_table(*columns)
        for cells in self.rows:
            named = dict(zip(self.columns, cells, strict=True))
            table.add_row(*(_text(named[column]) for column in columns))
        console.print(table)
        if left_out:
            note = f"A wider terminal also shows: {', '.join(left_out)}."
            console.print(Text(note, style="bright_black"), soft_wrap=True)

    def _needs(self, columns: Sequence[str]) -> int:
        """The width of these columns, the last one as narrow as can be read."""
        *others, last = columns
        return sum(self._width(column) + _GAP for column in others) + min(self._width(last), _READABLE)

    def _width(self, column: str, *, heading: bool = True) -> int:
        number = list(self.columns).index(column)
        cells = [_text(cells[number]) for cells in self.rows]
        return max(
            line.cell_len for text in (Text(column if heading else ""), *cells) for line in text.split()
        )


def stage_table(*columns: str) -> Table:
    """A table without boxes that neither cuts words nor colours in a pipe."""
    table = Table(box=None, pad_edge=False, header_style="bright_black", padding=(0, _GAP, 0, 0))
    for position, column in enumerate(columns):
        is_last = position == len(columns) - 1
        table.add_column(column, no_wrap=not is_last, overflow="fold")
    return table


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
