"""How often each cluster comes: in the raw pool, in what the curation chose, and in what training drew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from orchestrator.evaluation.report.figures import COLORS, DPI, FAINT, INK, save

Series = Mapping[str, Sequence[float]]


def cluster_shares(panels: Mapping[str, Series], path: Path, columns: int = 1) -> None:
    """Shares of clusters as steps, the clusters sorted by their size in the first series, which is filled.

    The shares are on a scale of ratios, as small clusters are what curation is for; a share of 0 is a gap.

    Args:
        panels: title → label of the legend → counts by cluster, in the same order of clusters and of one length
            within a panel.
        path: the PNG to write.
        columns: panels side by side.

    Raises:
        ValueError: nothing to draw, or lengths that differ.
    """
    for title, series in panels.items():
        if len({len(values) for values in series.values()}) != 1:
            raise ValueError(f"no counts of one length to draw for '{title}'")
    if not panels:
        raise ValueError("no clusters to draw")
    num_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.0 * columns, 3.8 * num_rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False)
    shares = [
        count / sum(values)
        for series in panels.values()
        for values in series.values()
        for count in values
        if count
    ]
    for axis, (title, series) in zip(grid.flat, panels.items(), strict=False):
        _draw(axis, title, series)
        axis.set_ylim(min(shares) / 1.5, max(shares) * 1.5)
    save(figure, path)


def _draw(axis: Any, title: str, series: Series) -> None:
    counts = {name: np.asarray(values, dtype=np.float64) for name, values in series.items()}
    first = next(iter(counts.values()))
    order = np.argsort(-first, kind="stable")
    edges = np.arange(len(first) + 1) + 0.5
    for at, (name, values) in enumerate(counts.items()):
        shares = values[order] / values.sum()
        drawn = np.where(shares > 0, shares, np.nan)
        if at == 0:
            axis.stairs(drawn, edges, fill=True, color=FAINT, label=name, baseline=0)
        else:
            # Lines that lie on each other are told apart by width and dashes.
            style = (
                {"linewidth": 3.2, "alpha": 0.55}
                if at == 1
                else {"linewidth": 1.6, "linestyle": (0, (4, 1.5))}
            )
            axis.stairs(drawn, edges, baseline=None, color=COLORS[at - 1], label=name, **style)
    axis.set_yscale("log")
    axis.set_xlim(edges[0], edges[-1])
    axis.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.grid(axis="y", color=FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=INK, labelsize=9, length=0)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    # Few clusters have shares within one power of ten, which has one tick.
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("cluster, the largest of the raw pool first", color=INK)
    axis.set_ylabel("share of the photos or draws", color=INK)
    axis.legend(frameon=False, fontsize=9, labelcolor=INK)
