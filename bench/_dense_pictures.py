"""What the heads of `dense_tuning` make of a few test pictures, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from orchestrator import load
from orchestrator.data.dense import DensePictures
from orchestrator.evaluation.report.dense_pictures import Row, class_maps, depth_maps
from orchestrator.evaluation.report.figures import DPI, save

_SHOWN = 3
_SIDE = 224
_TRUE, _FOUND = "#56B4E9", "#D55E00"


def classes(model: Path, pictures: DensePictures, rows: Sequence[int], path: Path) -> None:
    """Pictures with their true classes, and those that a model of segmentation gives."""
    class_maps(_compared(model, pictures, rows), 2, path)


def depths(model: Path, pictures: DensePictures, rows: Sequence[int], path: Path) -> None:
    """Pictures with their true depth, and that of a model."""
    depth_maps(_compared(model, pictures, rows), path)


def boxes(model: Path, pictures: DensePictures, rows: Sequence[int], path: Path) -> None:
    """Pictures with the true box of their stamp, blue, and the surest box of a model, orange."""
    found = load(model, trust_module="transformers").predict_boxes(
        [image for image, _ in _shown(pictures, rows)], least=0.0
    )
    figure = Figure(figsize=(2 * _SHOWN, 2), dpi=DPI, layout="constrained")
    for axis, (image, mask_HW), one in zip(
        figure.subplots(1, _SHOWN), _shown(pictures, rows), found, strict=True
    ):
        axis.imshow(image)
        axis.set_axis_off()
        x, y, width, height = cv2.boundingRect((mask_HW == 1).astype(np.uint8))
        side = np.float32(len(mask_HW))
        for box, colour in (
            (np.array([x, y, x + width, y + height]) / side, _TRUE),
            (one.boxes[0], _FOUND),
        ):
            left, top, right, bottom = (box * len(image)).tolist()
            place, size = (left, top), (right - left, bottom - top)
            axis.add_patch(Rectangle(place, *size, fill=False, edgecolor=colour, linewidth=1.5))
        axis.set_title(f"{one.scores[0]:.2f}", fontsize=9, loc="left", pad=3)
    save(figure, path)


def _compared(model: Path, pictures: DensePictures, rows: Sequence[int]) -> list[Row]:
    shown = _shown(pictures, rows)
    guesses = load(model, trust_module="transformers").predict_maps([image for image, _ in shown])
    return [(image, true, guess) for (image, true), guess in zip(shown, guesses, strict=True)]


def _shown(pictures: DensePictures, rows: Sequence[int]) -> list[tuple[NDArray[np.uint8], NDArray[Any]]]:
    """Evenly spread over the rows."""
    chosen = [rows[at] for at in np.linspace(0, len(rows) - 1, _SHOWN).round().astype(int)]
    return list(pictures.squares(chosen, _SIDE))
