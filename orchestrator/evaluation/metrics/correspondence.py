"""Correspondence between two views of a plane: does a patch find the same place in the other view? NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from orchestrator.config.dense import PairData
from orchestrator.data.decode import square
from orchestrator.data.dense import read_pair
from orchestrator.data.views import Side
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import figure, ratio
from orchestrator.evaluation.metrics.patch_grid import centres, side_for

Floats = NDArray[np.float64]

ALL = "all pairs"
_PICTURES = 2


class Correspondence(Metric):
    """Recall of the patch that shows the same place in another view, by nearest neighbour. Nothing is trained."""

    of_pixels: ClassVar[bool] = True
    has_photos: ClassVar[bool] = True

    data: PairData = Field(description="The pairs of views.")
    size: Side | None = Field(
        None,
        description="The side of the views, in pixels, rounded to whole patches. Default: each model's size.",
    )
    alpha: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.05, 0.1),
        min_length=1,
        description="The maximum distances of a match from the true place, as shares of the view's side.",
    )

    # Of the first pairs: both views, places and what was found, of the model that was measured last.
    _shown: list[Any] = PrivateAttr(default_factory=list)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Metric`: views and homographies."""
        try:
            pairs = self.data.pairs()
        except UserError:
            pairs = []  # `check` says what is missing
        return {
            "data": tuple(self.data.path / part for part in dict.fromkeys(p for pair in pairs for p in pair))
        }

    def check(self) -> None:
        """See :class:`Metric`: views that are missing, and files that hold no homography."""
        for pair in self.data.pairs():
            read_pair(self.data, pair)

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`recall_at_ALPHA`: over all patches whose place is in both views."""
        assert features.maps is not None, "`evaluate` gives it"
        size = side_for(self.size or features.size, features.patch)
        parts = []
        self._shown.clear()
        for pair in self.data.pairs():
            features.check()
            first, other, matrix = read_pair(self.data, pair)
            views = np.stack([square(first, size), square(other, size)])
            maps = features.maps(views)
            inside = crop(other.shape, size) @ matrix @ np.linalg.inv(crop(first.shape, size))
            from_P2, found_P2, error_P = matches(maps[0], maps[1], inside, size)
            if len(self._shown) < _PICTURES:
                right_P = error_P <= max(self.alpha) * size
                self._shown.append((views[0], views[1], from_P2 / size, found_P2 / size, right_P))
            hits = [float((error_P <= alpha * size).sum()) for alpha in self.alpha]
            parts.append([*hits, float(len(error_P))])
        found = np.array(parts)
        if not found[:, -1].any():
            raise UserError(
                "no patch of a first view is in the other view",
                where=str(self.data.path),
                hint="homographies map pixels of the first view, as (x, y, 1), to those of the other",
            )
        return {
            f"recall_at_{alpha:g}": figure(found[:, [at, -1]], ratio, ALL, features.seed, f"{size} px")
            for at, alpha in enumerate(self.alpha)
        }

    def picture(self, path: Path) -> bool:
        """See :class:`Metric`: the matches of the first pairs."""
        if not self._shown:
            return False
        from orchestrator.evaluation.report.dense_pictures import match_lines

        match_lines(self._shown, path)
        return True


def crop(shape_HWC: tuple[int, ...], size: int) -> Floats:
    """The matrix (3, 3) from pixels of a picture to those of its centred square of `size`."""
    height, width = shape_HWC[:2]
    side = min(height, width)
    scale = size / side
    return np.array(
        [[scale, 0, -scale * (width - side) / 2], [0, scale, -scale * (height - side) / 2], [0, 0, 1]]
    )


def matches(
    first_hwD: NDArray[np.floating[Any]], other_hwD: NDArray[np.floating[Any]], matrix: Floats, size: int
) -> tuple[Floats, Floats, Floats]:
    """Where each patch of the first view finds its match, for those whose true place is in the other view.

    Args:
        first_hwD, other_hwD: patch features of both views.
        matrix: from pixels of the first square to those of the other.
        size: the side of both squares.

    Returns:
        The middle of each patch, x and y in pixels (M, 2); the middle of its match (M, 2); and how far in pixels that
        is from the true place (M,).
    """
    centres_P2 = centres(first_hwD.shape[:2], size)
    mapped = np.column_stack([centres_P2, np.ones(len(centres_P2))]) @ matrix.T
    with np.errstate(divide="ignore", invalid="ignore"):
        true_P2 = mapped[:, :2] / mapped[:, 2:]
    # What is behind the camera has no place.
    there_P = (mapped[:, 2] > 0) & ((true_P2 >= 0) & (true_P2 < size)).all(axis=1)
    first_PD, other_PD = (_unit(one.reshape(-1, one.shape[-1])) for one in (first_hwD, other_hwD))
    best_P = (first_PD[there_P] @ other_PD.T).argmax(axis=1)
    found_P2 = centres(other_hwD.shape[:2], size)[best_P]
    errors: Floats = np.linalg.norm(found_P2 - true_P2[there_P], axis=1)
    return centres_P2[there_P], found_P2, errors


def _unit(x_ND: NDArray[np.floating[Any]]) -> Floats:
    x = x_ND.astype(np.float64)
    scaled: Floats = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return scaled
