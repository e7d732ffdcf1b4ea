"""What the models see in three photographs that nobody trained on, as PCA maps: `docs/distil-NAME.png`.

The photographs come with packages: scikit-learn's china.jpg (© danielbuechele) and flower.jpg (© vultilion), both
CC-BY-2.0, and matplotlib's grace_hopper.jpg (public domain).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import sklearn.datasets
import torch
from numpy.typing import NDArray

from bench.distil.score import TEACHERS, of_focus, of_net
from bench.distil.train import FOCUS, MODELS, SIZES, Weights
from bench.learning import measure
from orchestrator.data.decode import read_square
from orchestrator.evaluation.report.figures import pca_colors
from orchestrator.models import load_pretrained

FOLDER = Path(__file__).parents[2] / "docs"
_SIDE, _SHOWN = 448, 128
# A map is drawn at twice the size of training, as in the reports of `evaluate`.
_TWICE = 2
_INCHES, _DPI = 1.5, 100


def draw(nets: Mapping[str, Path], weights: Weights, folder: Path = FOLDER) -> list[Path]:
    """A row for each photograph: itself, then a map for each model.

    Args:
        nets: the model's folder by `KIND, how`.
        weights: of the teachers.
        folder: to write into.

    Returns:
        The pictures.
    """
    torch.set_num_threads(1)
    photos = {name: read_square(path, _SIDE) for name, path in _photos().items()}
    images_NCHW = np.stack(list(photos.values())).transpose(0, 3, 1, 2)
    looks = {
        "ViT, random weights": of_net(measure.random_net(MODELS["ViT"], 0), _TWICE * SIZES["ViT"]),
        **{
            who: of_net(load_pretrained(path), _TWICE * SIZES[who.partition(",")[0]])
            for who, path in nets.items()
        },
        TEACHERS[0]: of_focus(weights[FOCUS], _SIDE),
    }
    maps = {who: _colors(look(images_NCHW).patches) for who, look in looks.items()}
    paths = []
    for at, (name, photo) in enumerate(photos.items()):
        paths.append(folder / f"distil-{name}.png")
        small = np.asarray(cv2.resize(photo, (_SHOWN, _SHOWN), interpolation=cv2.INTER_AREA), np.uint8)
        _row({name: small, **{who: colors[at] for who, colors in maps.items()}}, paths[-1])
    return paths


def _photos() -> dict[str, Path]:
    flowers = Path(sklearn.datasets.__file__).parent / "images"
    return {
        "flower": flowers / "flower.jpg",
        "temple": flowers / "china.jpg",
        "portrait": Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg",
    }


def _colors(patches_NPD: NDArray[np.float32]) -> list[NDArray[np.floating]]:
    side = round(patches_NPD.shape[1] ** 0.5)
    return list(pca_colors(list(patches_NPD.reshape(len(patches_NPD), side, side, -1))))


def _row(panels: Mapping[str, NDArray[np.floating | np.uint8]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES * len(panels), _INCHES + 0.4), dpi=_DPI, layout="constrained")
    for at, (title, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), at)
        axes.set_title(title.replace(", ", ",\n").replace("teacher ", "teacher\n"), fontsize=7)
        axes.axis("off")
        axes.imshow(panel, interpolation="nearest")
    figure.savefig(path)
