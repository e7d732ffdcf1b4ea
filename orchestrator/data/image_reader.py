"""The pictures of a step, and others in the place of those that cannot be read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import Pixels, UnreadableImage, use_rgb
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.rng import derive
from orchestrator.data.sampler import SampleOrder, permute
from orchestrator.data.sources.folder import shown
from orchestrator.errors import UserError

T = TypeVar("T")

logger = logging.getLogger("orchestrator")

# So many pictures in a row that cannot be read are no accident, but a folder that is gone.
_TRIES = 8
_NAMED = 5


def most_unreadable(share: float, num_pictures: int) -> int:
    """How many pictures a stage may find unreadable: this share of its index, or one."""
    return max(1, int(share * num_pictures))


@dataclass(frozen=True)
class PictureFile:
    """A picture of an index that can be read.

    Attributes:
        record: what the index says of it.
        path: its file.
        pixels: how its values are seen.
        resized: reads it at another size, from the cache; None: from the file.
    """

    record: ImageRecord
    path: Path
    pixels: PixelFormat | None
    resized: ResizedImages | None

    def use(self, use: Callable[[Pixels], T], min_side: int | None) -> T:
        """What `use` makes of the pixels; see :func:`orchestrator.data.decode.use_rgb`."""
        if self.resized is not None:
            return self.resized.use(self.record, self.path, use, min_side, self.pixels)
        return use_rgb(self.path, use, min_side, self.record.max_pixels, pixels=self.pixels)


class ImageReader:
    """Reads what a sample order draws. What stands for an unreadable picture is a function of (seed, step, place).

    A stand-in is of the same component, drawn by the order's own keyed permutation, and none of the step's samples if
    there are others. So it is the same for any number of workers. The limit here is on what this process met: the
    training loop counts what all of them met.

    Several threads may read at once.

    Args:
        index: the photographs.
        order: sample ids by step.
        max_unreadable: share of the index's pictures (at least one picture) that may turn out unreadable.
        resized: reads pictures at another size, from the cache; None: from their files.
    """

    def __init__(
        self,
        index: ImageIndex,
        order: SampleOrder,
        max_unreadable: float,
        resized: ResizedImages | None = None,
    ) -> None:
        self._index, self._order, self._resized = index, order, resized
        self._limit = most_unreadable(max_unreadable, len(index))
        self._unreadable: dict[int, str] = {}
        self._troubles: list[str] = []
        self._lock = threading.Lock()

    def pop_troubles(self) -> list[str]:
        """What was met since the last call, a line for each picture; for whoever tells the user."""
        with self._lock:
            taken, self._troubles = self._troubles, []
        return taken if self._resized is None else [*taken, *self._resized.pop_troubles()]

    def paths(self, rows: Iterable[int]) -> list[str]:
        """Where these rows' files are."""
        return [shown(str(self._index.path(row))) for row in rows]

    def read(
        self, step: int, ids: NDArray[np.int64], place: int, read: Callable[[PictureFile], T]
    ) -> tuple[int, T, list[int]]:
        """One sample of a step.

        Args:
            step: the step.
            ids: all rows of the step, by the order.
            place: the sample's place in it.
            read: makes something of a picture.

        Returns:
            The row, or its complement where it stands for another one; what `read` made of it; and the rows that could
            not be read.

        Raises:
            UserError: too many pictures cannot be read.
        """
        drawn = int(ids[place])
        met: list[int] = []
        for row in self._candidates(step, ids, place):
            picture = PictureFile(
                self._index[row], self._index.path(row), self._index.pixels(row), self._resized
            )
            try:
                made = read(picture)
            except UnreadableImage as error:
                met.append(row)
                self._note(row, error.reason)
                if len(met) == _TRIES:
                    break
            else:
                return (row if row == drawn else ~row), made, met
        raise self._too_many(met, f"{len(met)} photos in a row cannot be read")

    def _candidates(self, step: int, ids: NDArray[np.int64], place: int) -> Iterator[int]:
        """The drawn row, then those that may stand for it."""
        drawn, order = int(ids[place]), self._order
        yield drawn
        rows = order.drawn_from(step, drawn)
        key = derive("stand-in", order.seed, step, place)
        # So many that some of them are not in the step, if any are not.
        positions = np.arange(min(len(rows), len(ids) + _TRIES), dtype=np.int64)
        others = rows[permute(positions, len(rows), key)]
        in_step = np.isin(others, ids)
        for row in (*others[~in_step], *others[in_step]):
            if row != drawn:
                yield int(row)

    def _note(self, row: int, reason: str) -> None:
        path = shown(str(self._index.path(row)))
        what = f"a photo cannot be read and is replaced by another one: {path}: {reason}"
        with self._lock:
            if row in self._unreadable:
                return
            self._unreadable[row] = reason
            self._troubles.append(what)
            met = list(self._unreadable)
        logger.warning("%s", what)
        if len(met) > self._limit:
            raise self._too_many(met, f"{len(met)} of {len(self._index)} photos cannot be read any more")

    def _too_many(self, rows: list[int], what: str) -> UserError:
        named = "; ".join(f"{self._index[row].path}: {self._unreadable[row]}" for row in rows[:_NAMED])
        more = f"; and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        return UserError(
            f"{what}: {named}{more}",
            where=self._index[rows[0]].root,
            hint="restore the files, raise `max_unreadable` of the stage, or run again: `curate` then makes a new "
            "index of the files that exist",
        )
