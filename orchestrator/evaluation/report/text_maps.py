"""Where in a photo a text is: similarity maps as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from orchestrator.evaluation.report.figures import DPI, INK, FeatureMap, RgbImage, extent, save

_SIDE = 1.6
_WRAP = 22
_FOOT = 0.2


def text_maps(
    photos: Sequence[RgbImage], maps: Sequence[FeatureMap], prompts: Sequence[str], path: Path
) -> None:
    """A row a photo: the photo, then for every prompt how like it each patch is.

    Each column has its own scale, dark to bright from the 2nd to the 98th percentile of its prompt over all
    photos: cosines of different prompts do not compare by eye, those of one prompt over photos do.

    Args:
        photos: uint8 (H, W, 3).
        maps: per photo (h, w, T), the similarity of each patch to each of the T prompts.
        prompts: T texts, the titles of the columns.
        path: the PNG to write.

    Raises:
        ValueError: no photo or no prompt, or numbers of photos, maps and prompts that differ.
    """
    if not prompts or not photos or [item.shape[2] for item in maps] != [len(prompts)] * len(photos):
        shapes = [item.shape for item in maps]
        raise ValueError(f"{len(photos)} photos and {len(prompts)} prompts, but maps of {shapes}")
    titles = [
        textwrap.fill(textwrap.shorten(prompt, 3 * _WRAP, placeholder=" …"), _WRAP) for prompt in prompts
    ]
    title_height = 0.16 * max(title.count("\n") + 1 for title in titles)
    size = _SIDE * (1 + len(prompts)), _SIDE * len(photos) + title_height + _FOOT
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=size, dpi=DPI, layout=layout)
    grid = figure.subplots(len(photos), 1 + len(prompts), squeeze=False)
    low_T, high_T = _scales(maps)
    for axes, photo, of_photo in zip(grid, photos, maps, strict=True):
        axes[0].imshow(photo)
        for at, axis in enumerate(axes[1:]):
            axis.imshow(
                of_photo[:, :, at],
                vmin=low_T[at],
                vmax=high_T[at],
                cmap="magma",
                interpolation="nearest",
                extent=extent(photo),
            )
    for axis in grid.flat:
        axis.set_axis_off()
    for axis, title in zip(grid[0, 1:], titles, strict=True):
        axis.set_title(title, fontsize=8, color=INK, loc="left", pad=3)
    figure.supxlabel("bright: near the text, dark: far; each column has its own scale", fontsize=8, color=INK)
    save(figure, path)


def _scales(maps: Sequence[FeatureMap]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values_NT = np.concatenate([item.reshape(-1, item.shape[2]) for item in maps]).astype(np.float64)
    low_T, high_T = np.percentile(values_NT, (2, 98), axis=0)
    # A map without differences stays dark instead of showing rounding as structure.
    return low_T, np.maximum(high_T, low_T + 1e-6)
