"""Small lines side by side: a row for each quantity, a column for each stage, one scale a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from orchestrator.evaluation.report.figures import COLORS, DPI, FAINT, INK, save

Line = tuple[Sequence[float], Sequence[float]]


def panels(table: Mapping[str, Mapping[str, Line]], columns: Mapping[str, str], path: Path) -> None:
    """Lines over steps, in a grid; what a column does not have stays empty.

    Args:
        table: row name → column name → (steps, values).
        columns: column name → its title.
        path: the PNG to write.

    Raises:
        ValueError: nothing to draw.
    """
    if not table or not columns:
        raise ValueError("no lines to draw")
    size = 1.6 + 2.0 * len(columns), 0.8 + 1.15 * len(table)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(table), len(columns), squeeze=False, sharex="col", sharey="row")
    for row, (name, lines) in enumerate(table.items()):
        grid[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
        for column, (of, title) in enumerate(columns.items()):
            axis = grid[row, column]
            axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
            axis.tick_params(colors=INK, labelsize=8, length=0)
            if row == 0:
                axis.set_title(title, fontsize=9, color=INK, loc="left")
            if of in lines:
                axis.grid(color=FAINT, linewidth=0.7)
                axis.plot(*lines[of], color=COLORS[column % len(COLORS)], linewidth=1.8)
            else:
                axis.set_facecolor("#F7F7F7")
            axis.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.yaxis.set_major_locator(MaxNLocator(3))
            axis.margins(y=0.12)
        values = {value for _, of in lines.values() for value in of}
        if len(values) == 1:
            # A scale around a constant would round it away: 0.999 is not 1.00.
            grid[row, 0].set_yticks(list(values), [f"{value:g}" for value in values])
    save(figure, path)
