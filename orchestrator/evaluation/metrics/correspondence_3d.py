"""Correspondence in space: does a patch find a place near its own in another view of the scene? NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from orchestrator.config.scenes import SceneData
from orchestrator.data.decode import square
from orchestrator.data.scenes import Seen, View, check_view, pairs_of, read_view
from orchestrator.data.views import Side
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.bootstrap import figure, ratio
from orchestrator.evaluation.metrics.correspondence import ALL, crop
from orchestrator.evaluation.metrics.patch_grid import centres, side_for
from orchestrator.evaluation.metrics.similarity import unit

Floats = NDArray[np.float64]

_PICTURES = 2


class Correspondence3d(Metric):
    """Recall, in metres, of the place that a patch finds in another view, by nearest neighbour. Nothing is trained.

    As in Probe3D (arXiv 2404.08636) an error is the distance in space between a patch and its match. Here only
    patches count whose place the other view shows.
    """

    of_pixels: ClassVar[bool] = True
    has_photos: ClassVar[bool] = True

    data: SceneData = Field(description="The scenes, with the views and the depth of each.")
    size: Side | None = Field(
        None,
        description="The side of the views, in pixels, rounded to whole patches. Default: each model's size.",
    )
    threshold: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.02, 0.05),
        min_length=1,
        description="The maximum distances of a match from the true place in space, in metres.",
    )

    _pairs: list[tuple[View, View]] | None = PrivateAttr(None)
    # Of the first pairs: both views, places and what was found, of the model that was measured last.
    _shown: list[Any] = PrivateAttr(default_factory=list)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Metric`: cameras, pictures and depth maps."""
        return self.data.files()

    def check(self) -> None:
        """See :class:`Metric`: pieces that are missing, poses that are none, depth maps of other sizes or units."""
        code = self.data.metres()
        for view in {view.image: view for pair in pairs_of(self.data) for view in pair}.values():
            check_view(view, code)

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`recall_at_THRESHOLDm`: of all patches whose place is in both views; intervals are over pairs."""
        assert features.maps is not None, "`evaluate` gives it"
        size, code = side_for(self.size or features.size, features.patch), self.data.metres()
        self._pairs = self._pairs or pairs_of(self.data)
        parts = []
        self._shown.clear()
        for pair in self._pairs:
            features.check()
            first, other = (read_view(view, code) for view in pair)
            views = np.stack([square(first.image_HWC, size), square(other.image_HWC, size)])
            maps = features.maps(views)
            found = matches_in_space(maps[0], maps[1], first, other, size, max(self.threshold))
            if len(self._shown) < _PICTURES:
                right_P = found.errors_P <= max(self.threshold)
                self._shown.append((*views, found.from_P2 / size, found.to_P2 / size, right_P))
            parts.append(
                [*((found.errors_P <= least).sum() for least in self.threshold), len(found.errors_P)]
            )
        hits = np.array(parts, dtype=np.float64)
        if not hits[:, -1].any():
            raise UserError(
                "no patch of a view shows a place that the other view shows, too",
                where=str(self.data.path),
                hint="poses map the world to the camera, which looks along z, with y down; depth is along z",
            )
        return {
            f"recall_at_{least:g}m": figure(hits[:, [at, -1]], ratio, ALL, features.seed, f"{size} px")
            for at, least in enumerate(self.threshold)
        }

    def picture(self, path: Path) -> bool:
        """See :class:`Metric`: the matches of the first pairs."""
        if not self._shown:
            return False
        from orchestrator.evaluation.report.dense_pictures import match_lines

        match_lines(self._shown, path)
        return True


class Found:
    """Matches of the patches of a view.

    Attributes:
        from_P2: the middle of each patch that counts, x and y in pixels of the square.
        to_P2: the middle of its match in the other square.
        errors_P: how far the two are from each other in space, in metres.
    """

    def __init__(self, from_P2: Floats, to_P2: Floats, errors_P: Floats) -> None:
        self.from_P2, self.to_P2, self.errors_P = from_P2, to_P2, errors_P


def matches_in_space(
    first_hwD: NDArray[np.floating[Any]],
    other_hwD: NDArray[np.floating[Any]],
    first: Seen,
    other: Seen,
    size: int,
    tolerance: float,
) -> Found:
    """Which patch of the other view each patch is most similar to (cosine), and how far apart they are in space.

    A patch counts if its middle has depth, the place is in the other square, and the depth there agrees with it: else
    something hides it. Matches are patches of the other square with depth.

    Args:
        first_hwD, other_hwD: patch features of both squares.
        first, other: the views at full size.
        size: the side of the squares, in pixels.
        tolerance: by how many metres depth may differ where both views show one place.
    """
    from_P2, points_P3, there_P = _places(first_hwD.shape[:2], first, size)
    to_Q2, others_Q3, has_depth_Q = _places(other_hwD.shape[:2], other, size)
    in_other_P2, z_P = other.project(points_P3)
    to_square = crop(other.image_HWC.shape, size)
    square_P2 = in_other_P2 * to_square[0, 0] + to_square[:2, 2]
    with np.errstate(invalid="ignore"):
        inside_P = ((square_P2 >= 0) & (square_P2 < size)).all(axis=1)
    depth_P = other.depth_at(in_other_P2)
    seen_P = there_P & inside_P & (depth_P > 0) & (np.abs(depth_P - z_P) <= tolerance)
    if not seen_P.any() or not has_depth_Q.any():
        return Found(np.empty((0, 2)), np.empty((0, 2)), np.empty(0))
    ours, theirs = (unit(one.reshape(-1, one.shape[-1])) for one in (first_hwD, other_hwD))
    best_P = (ours[seen_P] @ theirs[has_depth_Q].T).argmax(axis=1)
    errors_P = np.linalg.norm(points_P3[seen_P] - others_Q3[has_depth_Q][best_P], axis=1)
    return Found(from_P2[seen_P], to_Q2[has_depth_Q][best_P], errors_P)


def _places(grid: tuple[int, ...], seen: Seen, size: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """The middles of patches in the square, their places in the world, and which have depth."""
    centres_P2 = centres(grid, size)
    to_square = crop(seen.image_HWC.shape, size)
    points_P3, there_P = seen.points((centres_P2 - to_square[:2, 2]) / to_square[0, 0])
    return centres_P2, points_P3, there_P
