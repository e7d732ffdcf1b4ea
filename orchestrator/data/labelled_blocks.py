"""Blocks of photographs with what they are labelled with: random crops to train on, and whole splits to measure on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.blocks import Block
from orchestrator.data.boxes import BoxPictures
from orchestrator.data.crops import Box, cut, draw_box
from orchestrator.data.decode import Pixels, UnreadableImage, square, use_rgb
from orchestrator.data.dense import DensePictures
from orchestrator.data.image_reader import ImageReader
from orchestrator.data.index import ImageIndex
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.rng import generator
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.views import Range
from orchestrator.errors import UserError

_ASPECT = (3 / 4, 4 / 3)


class Annotations(Protocol):
    """What photographs are labelled with."""

    def arrays(self, row: int, shape: tuple[int, int], box: Box, size: int) -> Mapping[str, NDArray[Any]]:
        """What belongs to a crop of a photograph, by name; of the same shapes for every row.

        Args:
            row: of the index.
            shape: height and width of the photograph in which the box lies.
            box: the crop; mirrored where it says so.
            size: pixels a side of the crop that is made of the box.
        """
        ...


class ClassLabels:
    """A class a photograph: the array "classes", () int64.

    Args:
        classes_N: the class of every row of the index; -1 where it has none.
    """

    def __init__(self, classes_N: NDArray[np.int64]) -> None:
        self._classes_N = classes_N

    def arrays(self, row: int, shape: tuple[int, int], box: Box, size: int) -> Mapping[str, NDArray[Any]]:
        """See :class:`Annotations`: no crop changes a class."""
        return {"classes": np.asarray(self._classes_N[row])}


class PixelClasses:
    """A class a pixel: the array "classes", (size, size) int64; -1 where a pixel does not count.

    Args:
        pictures: with masks, by the rows of the index.
        numbers: of the classes in the masks, in their order; pixels of others do not count.
    """

    def __init__(self, pictures: DensePictures, numbers: Sequence[int]) -> None:
        self._pictures = pictures
        self._place_of = {number: place for place, number in enumerate(numbers)}

    def arrays(self, row: int, shape: tuple[int, int], box: Box, size: int) -> Mapping[str, NDArray[Any]]:
        """See :class:`Annotations`: the nearest pixel of the mask."""
        cropped = nearest_crop(self._pictures.target(row), shape, box, size)
        found, places = np.unique(cropped, return_inverse=True)
        numbered = np.array([self._place_of.get(int(number), -1) for number in found], dtype=np.int64)
        return {"classes": numbered[places].reshape(size, size)}


class PixelDepths:
    """A distance a pixel: the array "depth", (size, size) float32 in metres; 0 where a pixel does not count."""

    def __init__(self, pictures: DensePictures) -> None:
        self._pictures = pictures

    def arrays(self, row: int, shape: tuple[int, int], box: Box, size: int) -> Mapping[str, NDArray[Any]]:
        """See :class:`Annotations`: the nearest pixel of the depth map."""
        cropped = nearest_crop(self._pictures.target(row), shape, box, size)
        return {"depth": cropped.astype(np.float32)}


class BoxLabels:
    """Objects of a crop: "boxes" (M, 4) float32, centre and size in shares of the crop, and "classes" (M,) int64.

    Objects of which less than a part is in the crop are left out, and the boxes of the others are cut at its edges.

    Args:
        pictures: with boxes, by the rows of the index.
        numbers: of the categories, in their order; objects of others are left out.
        most: M; of more objects those with the largest boxes. Rows without an object have class -1.
        least: the part of an object's box that has to be in the crop.
    """

    def __init__(self, pictures: BoxPictures, numbers: Sequence[int], most: int, least: float = 0.3) -> None:
        self._pictures, self._most, self._least = pictures, most, least
        self._place_of = {number: place for place, number in enumerate(numbers)}

    def arrays(self, row: int, shape: tuple[int, int], box: Box, size: int) -> Mapping[str, NDArray[Any]]:
        """See :class:`Annotations`."""
        boxes_N4, categories_N = self._pictures.boxes(row)
        height, width = self._pictures.size(row)
        scale = np.array([shape[1] / width, shape[0] / height] * 2)
        origin, extent = np.array([box.left, box.top] * 2), np.array([box.width, box.height] * 2)
        whole_N4 = (boxes_N4 * scale - origin) / extent
        cut_N4 = whole_N4.clip(0, 1)
        areas_N, whole_N = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (cut_N4, whole_N4))
        classes_N = np.array([self._place_of.get(int(one), -1) for one in categories_N], dtype=np.int64)
        kept = np.flatnonzero((classes_N >= 0) & (areas_N > 0) & (areas_N >= self._least * whole_N))
        kept = np.sort(kept[np.argsort(-areas_N[kept], kind="stable")[: self._most]])
        found_N4 = cut_N4[kept]
        if box.flip:
            found_N4 = np.stack(
                [1 - found_N4[:, 2], found_N4[:, 1], 1 - found_N4[:, 0], found_N4[:, 3]], axis=1
            )
        boxes, classes = np.zeros((self._most, 4), np.float32), np.full(self._most, -1, np.int64)
        boxes[: len(kept), :2] = (found_N4[:, :2] + found_N4[:, 2:]) / 2
        boxes[: len(kept), 2:] = found_N4[:, 2:] - found_N4[:, :2]
        classes[: len(kept)] = classes_N[kept]
        return {"boxes": boxes, "classes": classes}


def nearest_crop(target_HW: NDArray[Any], shape: tuple[int, int], box: Box, size: int) -> NDArray[Any]:
    """A crop of a target, without mixing its numbers: of each output pixel the one that its centre falls on.

    Args:
        target_HW: of the photograph at any scale.
        shape: height and width of the photograph in which the box lies.
        box: see above.
        size: pixels a side of what is returned.
    """
    centres = (np.arange(size) + 0.5) / size
    rows = ((box.top + centres * box.height) * target_HW.shape[0] / shape[0]).astype(np.int64)
    columns = ((box.left + centres * box.width) * target_HW.shape[1] / shape[1]).astype(np.int64)
    cropped: NDArray[Any] = target_HW[rows[:, None], columns[None]]
    return cropped[:, ::-1] if box.flip else cropped


class LabelledBlocks:
    """Random resized crops with their labels, for training.

    Arrays of a block of S samples: "images" (S, 3, size, size) uint8, or uint16 where the index says so, "weights" (S,)
    float32, all 1, and those of the annotations.

    Args:
        index: the photographs.
        order: sample ids by step; its batch size must be a multiple of `block_size`.
        annotations: of the rows that the order draws.
        size: pixels of an image's side.
        block_size: samples in a block.
        seed: keys the crops.
        scale: smallest and largest share of the photograph's area that a crop takes.
        flip: whether half of the crops are mirrored.
        max_unreadable, resized: see :class:`ImageReader`.
    """

    def __init__(
        self,
        index: ImageIndex,
        order: SampleOrder,
        annotations: Annotations,
        *,
        size: int,
        block_size: int,
        seed: int,
        scale: Range,
        flip: bool,
        max_unreadable: float,
        resized: ResizedImages | None = None,
    ) -> None:
        assert order.batch_size % block_size == 0
        self.num_blocks = order.batch_size // block_size
        self._reader = ImageReader(index, order, max_unreadable, resized)
        self._order, self._annotations = order, annotations
        self._size, self._block_size, self._seed = size, block_size, seed
        self._scale, self._flip = scale, flip

    def load(self, step: int, index: int) -> Block:
        """The block `index` of `step`; raises UserError if too many files cannot be read."""
        assert 0 <= index < self.num_blocks, f"block {index} of {self.num_blocks}"
        drawn, ids = self._order.ids(step), np.empty(self._block_size, np.int64)
        samples: list[Mapping[str, NDArray[Any]]] = []
        unreadable: list[int] = []
        min_side = int(np.ceil(self._size / np.sqrt(self._scale[0])))
        for sample in range(self._block_size):

            def crop(image: Pixels, sample: int = sample) -> tuple[Pixels, tuple[int, int], Box]:
                rng = generator(self._seed, "labelled", step, index, sample)
                shape = image.shape[0], image.shape[1]
                box = draw_box(*shape, self._scale, _ASPECT, rng, self._flip)
                return cut(image, box, self._size).transpose(2, 0, 1), shape, box

            ids[sample], (pixels, shape, box), met = self._reader.read(
                step,
                drawn,
                index * self._block_size + sample,
                lambda picture: picture.use(crop, min_side),
            )
            unreadable += met
            row = int(ids[sample] if ids[sample] >= 0 else ~ids[sample])
            samples.append({"images": pixels, **self._annotations.arrays(row, shape, box, self._size)})
        arrays = _stacked(samples)
        arrays["weights"] = np.ones(self._block_size, np.float32)
        return Block(step, index, ids, arrays, unreadable=np.array(unreadable, np.int64))

    def pop_troubles(self) -> list[str]:
        """See :meth:`ImageReader.pop_troubles`."""
        return self._reader.pop_troubles()

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See :meth:`ImageReader.paths`."""
        return self._reader.paths(rows)


class SplitBlocks:
    """All photographs of a split once, as centred squares, whatever the step.

    The last block is filled up with its last photograph. "weights" (S,) float32 are 0 for that, and so chosen that the
    mean over blocks of the mean of weight · value is the mean of the value over the split.

    Args:
        index: the photographs.
        rows: of the split, at least one.
        annotations: of these rows.
        size: pixels of an image's side.
        block_size: samples in a block.
    """

    def __init__(
        self, index: ImageIndex, rows: Sequence[int], annotations: Annotations, *, size: int, block_size: int
    ) -> None:
        assert len(rows), "a split without photos"
        self.num_blocks = -(-len(rows) // block_size)
        self._index, self._rows, self._annotations = index, rows, annotations
        self._size, self._block_size = size, block_size

    def load(self, step: int, index: int) -> Block:
        """The block `index`.

        Raises:
            UserError: a photograph cannot be read: a figure would be of another split without it.
        """
        assert 0 <= index < self.num_blocks, f"block {index} of {self.num_blocks}"
        rows = [int(row) for row in self._rows[index * self._block_size : (index + 1) * self._block_size]]
        samples = [self._sample(row) for row in rows]
        num_padded = self._block_size - len(rows)
        arrays = _stacked([*samples, *[samples[-1]] * num_padded])
        weight = self.num_blocks * self._block_size / len(self._rows)
        arrays["weights"] = np.array([weight] * len(rows) + [0.0] * num_padded, np.float32)
        return Block(step, index, np.array(rows + rows[-1:] * num_padded, np.int64), arrays)

    def _sample(self, row: int) -> Mapping[str, NDArray[Any]]:
        path, limit = self._index.path(row), self._index[row].max_pixels
        try:
            pixels, shape = use_rgb(
                path,
                lambda image: (square(image, self._size), (image.shape[0], image.shape[1])),
                2 * self._size,
                limit,
                pixels=self._index.pixels(row),
            )
        except UnreadableImage as error:
            raise _unreadable(path, error) from error
        box = centre_box(*shape)
        return {
            "images": pixels.transpose(2, 0, 1),
            **self._annotations.arrays(row, shape, box, self._size),
        }


def centre_box(height: int, width: int) -> Box:
    """The largest centred square."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def _stacked(samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}


def _unreadable(path: Path, error: UnreadableImage) -> UserError:
    return UserError(
        f"a photo of the split cannot be read any more: {error.reason}",
        where=str(path),
        hint="restore the file, or run again: `curate` then makes a new index of the files that exist",
    )
