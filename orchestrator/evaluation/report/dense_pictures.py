"""What a model makes of a few pictures, pixel by pixel: classes, depth, and places that it finds again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from numpy.typing import NDArray

from orchestrator.evaluation.report.figures import DPI, FAINT, INK, RgbImage, save

_SIDE = 2.0
_LINES = 40
_RIGHT, _WRONG = "#009E73", "#D55E00"

# A picture, what is true of its pixels, and what a model says, each of any resolution.
Row = tuple[RgbImage, NDArray[Any], NDArray[Any]]
# Two views, points x and y in the first and in the other one, in shares of the side, and which of them are right.
Matches = tuple[RgbImage, RgbImage, NDArray[np.floating[Any]], NDArray[np.floating[Any]], NDArray[np.bool_]]


def class_maps(rows: Sequence[Row], num_classes: int, path: Path) -> None:
    """A line a picture: itself, its true classes, and those that a model gives; grey does not count.

    Args:
        rows: classes are integers from 0, -1 where they do not count.
        num_classes: how many there are.
        path: the PNG to write.
    """
    # Neighbouring numbers get colours that differ; from 20 classes on they come again.
    colours = [colormaps["tab20"](at % 20) for at in range(num_classes)]
    shown = [(photo, _masked(true), _masked(guess)) for photo, true, guess in rows]
    _grid(shown, path, ListedColormap(colours), [(-0.5, num_classes - 0.5)] * len(rows))


def depth_maps(rows: Sequence[Row], path: Path) -> None:
    """A line a picture: itself, its true depth, and that of a model on the same scale; grey has no true depth."""
    ranges = []
    for _, true, _ in rows:
        there = true[true > 0]
        ranges.append((float(there.min()), float(there.max())) if len(there) else (0.0, 1.0))
    shown = [(photo, np.ma.masked_less_equal(true, 0), guess) for photo, true, guess in rows]
    _grid(shown, path, colormaps["viridis"], ranges)


def match_lines(rows: Sequence[Matches], path: Path) -> None:
    """A line a pair: both views, and lines between the places that a model takes for the same; right ones are green.

    Of many matches a part is drawn, evenly spread.
    """
    figure = Figure(figsize=(2 * _SIDE * 1.4, _SIDE * 1.4 * len(rows)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (first, other, from_M2, to_M2, right_M) in zip(grid, rows, strict=True):
        left.imshow(first, extent=(0, 1, 1, 0))
        right.imshow(other, extent=(0, 1, 1, 0))
        for axis in (left, right):
            axis.set_axis_off()
        for at in range(0, len(from_M2), max(1, len(from_M2) // _LINES)):
            line = ConnectionPatch(
                from_M2[at], to_M2[at], "data", "data", axesA=left, axesB=right,
                color=_RIGHT if right_M[at] else _WRONG, linewidth=0.8, alpha=0.8,
            )  # fmt: skip
            figure.add_artist(line)
    save(figure, path)


def _masked(classes: NDArray[Any]) -> NDArray[Any]:
    masked: NDArray[Any] = np.ma.masked_less(classes, 0)
    return masked


def _grid(
    rows: Sequence[tuple[RgbImage, Any, Any]],
    path: Path,
    colours: Any,
    ranges: Sequence[tuple[float, float]],
) -> None:
    figure = Figure(figsize=(3 * _SIDE, _SIDE * len(rows) + 0.25), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, row, (low, high) in zip(grid, rows, ranges, strict=True):
        axes[0].imshow(row[0])
        for axis, values in zip(axes[1:], row[1:], strict=True):
            axis.set_facecolor(FAINT)
            axis.imshow(values, vmin=low, vmax=high, cmap=colours, interpolation="nearest")
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for axis, title in zip(grid[0], ("picture", "true", "model"), strict=True):
        axis.set_title(title, fontsize=9, color=INK, loc="left", pad=3)
    save(figure, path)
