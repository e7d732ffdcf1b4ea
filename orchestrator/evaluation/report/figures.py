"""Figures of a run as PNG files, drawn without pyplot and therefore without global state or a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

RgbImage = NDArray[np.uint8]
FeatureMap = NDArray[np.floating]

# Okabe and Ito's palette: told apart with colour-blind eyes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
INK, FAINT = "#333333", "#D9D9D9"
DPI = 120


def pca_maps(
    photos: Sequence[RgbImage],
    features: Sequence[FeatureMap],
    path: Path,
    titles: Sequence[str] | None = None,
    pairs_per_row: int = 1,
) -> None:
    """Photo beside the first three principal components of its patch features, shown as red, green and blue.

    The components are fitted on the patches of all photos together, so that a colour means the same in every
    map; each component is scaled between its 2nd and 98th percentile.

    Args:
        photos: uint8 (H, W, 3).
        features: per photo (h, w, D), any h and w, one D.
        path: the PNG to write.
        titles: one per photo.
        pairs_per_row: photos in one line of the picture.

    Raises:
        ValueError: no photo, or numbers of photos, maps and titles that differ.
    """
    _check_pairs(photos, features, titles)
    maps = pca_colors(features)
    figure, axes = _photo_grid(photos, titles, pairs_per_row)
    for at, (photo, colors) in enumerate(zip(photos, maps, strict=True)):
        left, right = axes[at]
        left.imshow(photo)
        right.imshow(colors, interpolation="nearest", extent=extent(photo))
    save(figure, path)


def pca_colors(features: Sequence[FeatureMap]) -> list[NDArray[np.float64]]:
    """Joint PCA of several feature maps as RGB in [0, 1], one (h, w, 3) per map (see :func:`pca_maps`)."""
    patches_ND = np.concatenate([f.reshape(-1, f.shape[-1]) for f in features]).astype(np.float64)
    patches_ND -= patches_ND.mean(axis=0)
    _, axes_DD = np.linalg.eigh(patches_ND.T @ patches_ND)
    axes_DC = axes_DD[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary; fixing it keeps pictures alike from one machine to the next.
    axes_DC = axes_DC * np.sign(axes_DC[np.abs(axes_DC).argmax(axis=0), np.arange(axes_DC.shape[1])])
    scores_NC = patches_ND @ axes_DC
    low_C, high_C = np.percentile(scores_NC, (2, 98), axis=0)
    has_spread_C = high_C - low_C > 1e-9
    scaled_NC = (scores_NC - low_C) / np.where(has_spread_C, high_C - low_C, 1.0)
    colors_N3 = np.full((len(scores_NC), 3), 0.5)
    colors_N3[:, : scores_NC.shape[1]] = np.where(has_spread_C, scaled_NC, 0.5).clip(0, 1)
    ends = np.cumsum([f.shape[0] * f.shape[1] for f in features])[:-1]
    parts = np.split(colors_N3, ends)
    return [part.reshape(*f.shape[:2], 3) for part, f in zip(parts, features, strict=True)]


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    title: str,
    ylabel: str,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Lines over training steps, named in a legend if there are several; values that are not finite are gaps.

    Args:
        series: name → (steps, values).
        path: the PNG to write.
        title, ylabel: plain text.
        marks: name → step at which something of that name begins, as a dashed line.

    Raises:
        ValueError: nothing to draw.
    """
    if not any(len(steps) for steps, _ in series.values()):
        raise ValueError(f"no points to draw for '{title}'")
    figure = Figure(figsize=(7.0, 3.8), dpi=DPI, layout="constrained")
    axis = figure.add_subplot()
    for at, (name, (steps, values)) in enumerate(series.items()):
        marker = "o" if len(steps) < 12 else None
        color = COLORS[at % len(COLORS)]
        # Beyond the palette, dashes tell the second round of colours from the first.
        style = "-" if at < len(COLORS) else "--"
        axis.plot(steps, values, style, color=color, label=name, linewidth=1.6, marker=marker, markersize=3.5)
    for name, step in (marks or {}).items():
        axis.axvline(step, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        right_above = axis.get_xaxis_transform() + ScaledTranslation(2 / 72, 3 / 72, figure.dpi_scale_trans)
        axis.text(step, 1, name, transform=right_above, fontsize=8, color=INK, va="bottom")
    _bare(axis, title, grid="y", pad=20 if marks else 8)
    axis.set_xlabel("step", color=INK)
    axis.set_ylabel(ylabel, color=INK)
    if len(series) > 1:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    save(figure, path)


def bars(
    table: Sequence[tuple[str, float, str]],
    path: Path,
    title: str,
    baselines: Mapping[str, float] | None = None,
    errors: Sequence[float | tuple[float, float]] | None = None,
) -> None:
    """Horizontal bars from top to bottom, coloured by group, each with its value; baselines as dashed lines.

    Args:
        table: (label, value, group) of each bar.
        path: the PNG to write.
        title: plain text.
        baselines: name → value, such as the level of chance.
        errors: half the length of each bar's error bar, or how far it goes below and above the value.

    Raises:
        ValueError: nothing to draw, or not as many errors as bars.
    """
    if not table:
        raise ValueError(f"no bars to draw for '{title}'")
    if errors is not None and len(errors) != len(table):
        raise ValueError(f"{len(errors)} errors for {len(table)} bars")
    baselines = baselines or {}
    groups = list(dict.fromkeys(group for _, _, group in table))
    figure = Figure(figsize=(7.0, 1.3 + 0.34 * len(table)), dpi=DPI, layout="constrained")
    axis = figure.add_subplot()
    for at, group in enumerate(groups):
        rows = [row for row, (_, _, of) in enumerate(table) if of == group]
        widths = [table[row][1] for row in rows]
        spread = None if errors is None else np.array([_both(errors[row]) for row in rows]).T
        drawn = axis.barh(
            rows,
            widths,
            height=0.68,
            color=COLORS[at % len(COLORS)],
            label=group,
            xerr=spread,
            error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 2.5},
        )
        value_labels = axis.bar_label(drawn, fmt="{:.3g}", padding=4, fontsize=9, color=INK)
        for value_label in value_labels:
            value_label.set_bbox({"color": "white", "pad": 1.0})
    for name, value in baselines.items():
        axis.axvline(value, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        above = axis.get_xaxis_transform() + ScaledTranslation(0, 3 / 72, figure.dpi_scale_trans)
        axis.text(value, 1, name, transform=above, fontsize=8, color=INK, ha="center", va="bottom")
    _bare(axis, title, grid="x", pad=20 if baselines else 8)
    axis.set_yticks(range(len(table)), [label for label, _, _ in table])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.margins(x=0.12)
    if len(groups) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(groups), 4), frameon=False, fontsize=9)
    save(figure, path)


def _both(error: float | tuple[float, float]) -> tuple[float, float]:
    return error if isinstance(error, tuple) else (error, error)


def _check_pairs(
    photos: Sequence[RgbImage], features: Sequence[FeatureMap], titles: Sequence[str] | None
) -> None:
    num_titles = len(photos) if titles is None else len(titles)
    if len(photos) == 0 or not len(photos) == len(features) == num_titles:
        raise ValueError(
            f"{len(photos)} photos, {len(features)} feature maps and {num_titles} titles do not pair up"
        )


def _photo_grid(
    photos: Sequence[RgbImage], titles: Sequence[str] | None, pairs_per_row: int
) -> tuple[Figure, list[tuple[Any, Any]]]:
    """A figure with two bare axes a photo, and those axes in the photos' order."""
    num_columns = min(pairs_per_row, len(photos))
    num_rows = -(-len(photos) // num_columns)
    side = 2.0
    # Wide pictures are shown smaller, and their titles have to be read there, too.
    font_size = 8.0 * (1 + num_columns) / 2
    title_height = 0.03 * font_size if titles else 0.0
    size = 2 * side * num_columns, (side + title_height) * num_rows
    layout = ConstrainedLayoutEngine(w_pad=0.025, h_pad=0.025, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=size, dpi=DPI, layout=layout)
    grid = figure.subplots(num_rows, 2 * num_columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    pairs = [(row[2 * at], row[2 * at + 1]) for row in grid for at in range(num_columns)][: len(photos)]
    for (left, _), title in zip(pairs, titles or (), strict=bool(titles)):
        left.set_title(title, fontsize=font_size, color=INK, loc="left", pad=3)
    return figure, pairs


def extent(photo: RgbImage) -> tuple[float, float, float, float]:
    """Draws a map of any resolution over the area of its photo."""
    return (-0.5, photo.shape[1] - 0.5, photo.shape[0] - 0.5, -0.5)


def _bare(axis: Any, title: str, grid: str, pad: float = 8) -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK, pad=pad)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.grid(axis=grid, color=FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9, length=0)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, its folder with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the software tag the bytes depend on nothing but the picture.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
