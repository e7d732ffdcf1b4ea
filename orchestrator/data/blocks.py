"""Blocks: the smallest unit of data, of randomness and of batch-coupled maths.

A step is `num_blocks` blocks whoever computes them; everything random in a block is keyed by
(seed, step, block, view, sample), so its arrays are the same on any worker of any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.crops import cut, draw_box, make_views
from orchestrator.data.decode import Pixels
from orchestrator.data.image_reader import ImageReader, PictureFile
from orchestrator.data.index import ImageIndex
from orchestrator.data.masking import block_masks
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.rng import generator
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError

_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Block:
    """One block of a step: rows `ids` (S,); `weight` is 0 for padding that evens out collectives.

    A row that stands for one whose file could not be read is written as its complement, -1 - row. `unreadable` (R,)
    are the rows whose files could not be read; it may have those of other blocks of the step, too.
    """

    step: int
    index: int
    ids: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]]
    weight: float = 1.0
    unreadable: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def num_replaced(self) -> int:
        """Samples whose own files could not be read."""
        return int((self.ids < 0).sum())


def with_unreadable(block: Block, rows: NDArray[np.int64] | None) -> Block:
    """The block, with more rows whose files could not be read; None are none."""
    if rows is None or not len(rows):
        return block
    return replace(block, unreadable=np.concatenate([block.unreadable, rows]))


class BlockSource(Protocol):
    """Where a training loop gets its data; `load` is a pure function of (step, index).

    A source with an attribute `parallel` that is true is asked by several threads at once, several steps ahead.
    """

    num_blocks: int

    def load(self, step: int, index: int) -> Block: ...


@runtime_checkable
class ReportsTroubles(Protocol):
    """A source that met something which the user should hear of, and which does not stop the training."""

    def pop_troubles(self) -> list[str]: ...

    def paths(self, rows: Iterable[int]) -> list[str]: ...


class CropBlocks:
    """Blocks of multi-crop views for self-supervised training.

    Arrays of a block of S samples: "globals" (G, S, C, H, W) uint8, "locals" (L, S, C, h, w) uint8, "masks"
    (G, S, P) bool, and with `gram_size` "gram" (G, S, C, H', W') uint8. Pixels are uint16 where the index says so.

    Args:
        index: the photographs.
        order: sample ids by step; its batch size must be a multiple of `block_size`.
        crops: the views of each step (mixed resolutions change by step).
        patch_size: pixels of a patch's side; must divide the global size. None: there are no masks.
        block_size: samples in a block.
        seed: keys all crops and masks.
        mask_ratio: smallest and largest masked share of a masked view.
        mask_probability: share of the block's global views that are masked.
        like: other views of the same photographs, whose boxes these are to share.
        max_unreadable, resized: see :class:`ImageReader`.

    Raises:
        UserError: sizes that do not divide.
    """

    parallel: ClassVar[bool] = True

    def __init__(
        self,
        index: ImageIndex,
        order: SampleOrder,
        crops: Callable[[int], CropConfig],
        *,
        patch_size: int | None,
        block_size: int,
        seed: int,
        max_unreadable: float,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        mask_probability: float = 0.5,
        like: CropConfig | None = None,
        resized: ResizedImages | None = None,
    ) -> None:
        self.num_blocks = _num_blocks(order, block_size)
        self._like = like
        self._reader = ImageReader(index, order, max_unreadable, resized)
        self._order, self._crops = order, crops
        self._patch_size, self._block_size, self._seed = patch_size, block_size, seed
        self._mask_ratio, self._mask_probability = mask_ratio, mask_probability
        _check_patches(crops(0), patch_size)

    def load(self, step: int, index: int) -> Block:
        """The block `index` of `step`.

        Raises:
            UserError: this step's crop size is not a multiple of the patch size, or too many files cannot be read.
        """
        assert 0 <= index < self.num_blocks, f"block {index} of {self.num_blocks}"
        config = self._crops(step)
        _check_patches(config, self._patch_size)
        drawn, ids, samples = self._order.ids(step), [], []
        unreadable: list[int] = []
        for sample in range(self._block_size):

            def rng_for_view(view: int, sample: int = sample) -> np.random.Generator:
                return generator(self._seed, "crop", step, index, view, sample)

            def views(picture: PictureFile) -> dict[str, NDArray[Any]]:
                drawn_in: tuple[int, int] | None = None
                if self._like is not None and self._like.min_side != config.min_side:
                    # Both are decoded as they are without each other, so that neither changes with the other.
                    drawn_in = picture.use(lambda image: image.shape[:2], self._like.min_side)
                is_colour = picture.pixels is None or picture.pixels.is_colour
                return picture.use(
                    lambda image: make_views(image, config, rng_for_view, drawn_in, is_colour),
                    config.min_side,
                )

            row, made, met = self._reader.read(step, drawn, index * self._block_size + sample, views)
            ids.append(row)
            unreadable += met
            samples.append(made)
        arrays: dict[str, NDArray[Any]] = {
            name: np.stack([views[name] for views in samples], axis=1) for name in samples[0]
        }
        if self._patch_size is not None:
            arrays["masks"] = self._masks(step, index, config, self._patch_size)
        rows = np.array(ids, np.int64)
        return Block(step, index, rows, arrays, unreadable=np.array(unreadable, np.int64))

    def pop_troubles(self) -> list[str]:
        """See :meth:`ImageReader.pop_troubles`."""
        return self._reader.pop_troubles()

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See :meth:`ImageReader.paths`."""
        return self._reader.paths(rows)

    def _masks(self, step: int, index: int, config: CropConfig, patch_size: int) -> NDArray[np.bool_]:
        grid = config.global_size // patch_size
        rng = generator(self._seed, "mask", step, index)
        num_views = config.num_global * self._block_size
        masks = block_masks(num_views, grid, grid, rng, self._mask_ratio, self._mask_probability)
        return masks.reshape(config.num_global, self._block_size, grid * grid)


class CaptionBlocks:
    """Blocks of photographs with their captions for text alignment.

    Arrays of a block of S samples: "images" (S, C, size, size) uint8 or uint16, "tokens" (S, context) int64 padded
    with 0, "lengths" (S,) int64, the number of tokens with the end-of-text token.

    Args:
        index: the photographs; every row that `order` draws from must have a caption.
        order: sample ids by step; its batch size must be a multiple of `block_size`.
        size: pixels of an image's side.
        block_size: samples in a block.
        seed: keys the crops.
        encode: caption → token ids, the last of which is the end-of-text token.
        context: most tokens of a caption; longer ones lose their middle and keep the end-of-text token.
        scale: smallest and largest share of the photograph's area that a crop takes.
        max_unreadable, resized: see :class:`ImageReader`.

    Raises:
        UserError: rows without captions, or sizes that do not divide.
    """

    def __init__(
        self,
        index: ImageIndex,
        order: SampleOrder,
        *,
        size: int,
        block_size: int,
        seed: int,
        max_unreadable: float,
        encode: Callable[[str], list[int]],
        context: int = 77,
        scale: tuple[float, float] = (0.5, 1.0),
        resized: ResizedImages | None = None,
    ) -> None:
        self.num_blocks = _num_blocks(order, block_size)
        captions = index.captions
        without = [int(row) for row in order.rows if not captions[row]]
        if without:
            raise UserError(
                f"{len(without)} photos have no caption, the first is {index[without[0]].path}",
                where=index[without[0]].root,
                hint="give the dataset a `captions` file with a `caption` column, or drop those photos",
            )
        self._index, self._order = index, order
        self._reader = ImageReader(index, order, max_unreadable, resized)
        self._size, self._block_size, self._seed = size, block_size, seed
        self._encode, self._context, self._scale = encode, context, scale

    def load(self, step: int, index: int) -> Block:
        """The block `index` of `step`; raises UserError if too many files cannot be read."""
        assert 0 <= index < self.num_blocks, f"block {index} of {self.num_blocks}"
        drawn, ids = self._order.ids(step), np.empty(self._block_size, np.int64)
        kind = np.uint16 if self._index.is_deep else np.uint8
        images = np.empty((len(ids), self._index.num_channels, self._size, self._size), kind)
        tokens = np.zeros((len(ids), self._context), np.int64)
        lengths = np.empty(len(ids), np.int64)
        unreadable: list[int] = []
        min_side = int(np.ceil(self._size / np.sqrt(self._scale[0])))
        for sample in range(self._block_size):

            def crop(image: Pixels, sample: int = sample) -> Pixels:
                rng = generator(self._seed, "caption", step, index, sample)
                box = draw_box(image.shape[0], image.shape[1], self._scale, _ASPECT, rng)
                return cut(image, box, self._size).transpose(2, 0, 1)

            ids[sample], images[sample], met = self._reader.read(
                step,
                drawn,
                index * self._block_size + sample,
                lambda picture: picture.use(crop, min_side),
            )
            unreadable += met
            row = ids[sample] if ids[sample] >= 0 else ~ids[sample]
            encoded = self._encode(self._caption(int(row), step, index, sample))
            if len(encoded) > self._context:
                encoded = [*encoded[: self._context - 1], encoded[-1]]
            tokens[sample, : len(encoded)] = encoded
            lengths[sample] = len(encoded)
        arrays: dict[str, NDArray[Any]] = {"images": images, "tokens": tokens, "lengths": lengths}
        return Block(step, index, ids, arrays, unreadable=np.array(unreadable, np.int64))

    def _caption(self, row: int, step: int, index: int, sample: int) -> str:
        """The row's caption; of several one that is drawn for this sample of this step."""
        record = self._index[row]
        if not record.captions:
            return record.caption or ""
        drawn = generator(self._seed, "which caption", step, index, sample).integers(len(record.captions))
        return record.captions[int(drawn)]

    def pop_troubles(self) -> list[str]:
        """See :meth:`ImageReader.pop_troubles`."""
        return self._reader.pop_troubles()

    def paths(self, rows: Iterable[int]) -> list[str]:
        """See :meth:`ImageReader.paths`."""
        return self._reader.paths(rows)


def _num_blocks(order: SampleOrder, block_size: int) -> int:
    if block_size < 1 or order.batch_size % block_size:
        raise UserError(
            f"a batch of {order.batch_size} samples does not divide into blocks of {block_size}",
            hint="make batch_size a multiple of block_size",
        )
    return order.batch_size // block_size


def _check_patches(config: CropConfig, patch_size: int | None) -> None:
    if patch_size is None:
        return
    for name, size in (("global_size", config.global_size), ("local_size", config.local_size)):
        if size % patch_size:
            raise UserError(
                f"{name} {size} is not a multiple of the patch size {patch_size}",
                hint=f"use {max(1, round(size / patch_size)) * patch_size}",
            )
