"""Detection: average precision of the boxes that a fine-tuned model finds, on a data set in COCO's format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr

from orchestrator.config.boxes import BoxData
from orchestrator.data.boxes import BoxPictures
from orchestrator.data.decode import UnreadableImage, read_rgb, square
from orchestrator.data.labelled_blocks import centre_box
from orchestrator.data.splits import Splits
from orchestrator.data.views import Side
from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Features, Figure, Metric
from orchestrator.evaluation.metrics.average_precision import ImageBoxes, Precisions
from orchestrator.evaluation.metrics.bootstrap import ends, resampled

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

_BATCH = 8
# An object is in the square if this part of its box is, as in fine-tuning.
_LEAST = 0.3


class DetectionPrecision(Metric):
    """COCO's average precision on test pictures, of models that find boxes; others have no row."""

    needs_head: ClassVar[str | None] = "detection"
    has_photos: ClassVar[bool] = True

    data: BoxData = Field(description="The pictures and their boxes, with their split.")
    size: Side | None = Field(
        None,
        description="The side of the pictures, in pixels, rounded to whole patches. Default: each model's size.",
    )
    _opened: tuple[BoxPictures, Splits] | None = PrivateAttr(None)

    def files(self) -> Mapping[str, tuple[Path, ...]]:
        """See :class:`Metric`: the files of boxes, the pictures that they are in, and what splits them."""
        found = {"data.annotations": self.data.annotations}
        if self.data.split is not None:
            found |= {f"data.split.{field}": paths for field, paths in self.data.split.files().items()}
        if not all(path.is_file() for path in self.data.annotations):
            return found
        try:
            return {**found, "data.path": tuple(BoxPictures(self.data).paths)}
        except UserError:
            return found  # `check` tells it

    def check(self) -> None:
        """See :class:`Metric`: boxes that are none, and pictures of another size than their boxes are in."""
        BoxPictures(self.data).check()

    def is_fair(self, learned: Any) -> bool:
        """See :class:`Metric`: other pictures, or the same ones with the same split."""
        if not isinstance(learned, BoxData) or learned.path != self.data.path:
            return True
        return learned.chosen_split() == self.data.chosen_split()

    def measure(self, features: Features) -> Mapping[str, float | Figure]:
        """`map` and `map_50` of centred squares; intervals are of draws of pictures. Nothing without a head."""
        if features.boxes is None:
            return {}
        pictures, splits = self._open(features)
        unknown = sorted(set(pictures.names.values()) - set(features.classes))
        number_of = {name: number for number, name in pictures.names.items()}
        # A class that the data set lacks has no objects: what is found of it counts for nothing.
        numbers = np.array([number_of.get(name, -1) for name in features.classes], dtype=np.int64)
        images = list(self._found(features, pictures, splits.test, numbers))
        precisions = Precisions(images)
        whole = precisions.of(np.ones(len(images), dtype=np.int64))
        if not np.isfinite(whole["map"]):
            raise UserError(
                "no picture of test has a box",
                where=str(self.data.annotations[0]),
                hint="split the pictures otherwise",
            )
        drawn = [precisions.of(counts_I) for counts_I in resampled(len(images), features.seed)]
        note = f"{len(unknown)} categories that the model did not learn" if unknown else ""
        return {
            name: Figure(value, *ends([one[name] for one in drawn]), "test", len(images), note)
            for name, value in whole.items()
        }

    def _open(self, features: Features) -> tuple[BoxPictures, Splits]:
        if self._opened is None:
            pictures = BoxPictures(self.data)
            splits = Splits.of(
                pictures.index(), self.data.chosen_split(), where=str(self.data.path), stop=features.check
            )
            self._opened = pictures, splits
        return self._opened

    def _found(
        self, features: Features, pictures: BoxPictures, rows: NDArray[np.int64], numbers: Ids
    ) -> Iterator[ImageBoxes]:
        """What the model finds in each of these pictures, and what is there; a few are in memory at a time."""
        assert features.boxes is not None
        # The head was trained at one size.
        size = self.size or features.size
        size = max(1, round(size / features.patch)) * features.patch
        for start in range(0, len(rows), _BATCH):
            features.check()
            part = rows[start : start + _BATCH].tolist()
            squares = np.stack([square(_pixels(pictures.paths[row]), size) for row in part])
            for row, (boxes_N4, scores_N, places_N) in zip(part, features.boxes(squares), strict=True):
                true_boxes, true_classes = in_square(pictures, row, pictures.boxes(row), _LEAST)
                crowd_boxes, crowd_classes = in_square(pictures, row, pictures.crowds(row), 0.0)
                yield ImageBoxes(
                    boxes_N4.astype(np.float64),
                    scores_N.astype(np.float64),
                    numbers[places_N],
                    true_boxes,
                    true_classes,
                    crowd_boxes,
                    crowd_classes,
                )


def in_square(pictures: BoxPictures, row: int, boxes: tuple[Floats, Ids], least: float) -> tuple[Floats, Ids]:
    """Boxes of a picture as shares of its centred square, cut at its edges, and their categories.

    Args:
        pictures, row: which picture.
        boxes: (M, 4) as corners in pixels of the picture, and categories (M,).
        least: the part of a box that has to be in the square.
    """
    boxes_M4, categories_M = boxes
    box = centre_box(*pictures.size(row))
    whole_M4 = (boxes_M4 - np.array([box.left, box.top] * 2)) / np.array([box.width, box.height] * 2)
    cut_M4 = whole_M4.clip(0, 1)
    cut_M, whole_M = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (cut_M4, whole_M4))
    kept_M = (cut_M > 0) & (cut_M >= least * whole_M)
    return cut_M4[kept_M], categories_M[kept_M]


def _pixels(path: Path) -> NDArray[np.uint8]:
    try:
        return read_rgb(path)
    except UnreadableImage as error:
        raise UserError(
            f"a picture cannot be read: {error.reason}", where=str(path), hint="copy it again"
        ) from error
