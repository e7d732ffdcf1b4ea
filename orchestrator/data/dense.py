"""Pictures with a class or a depth for every pixel, and pairs of views: what `config/dense.py` names, read and checked.

pictures = DensePictures(data)
splits = pictures.splits(where="stages.evaluate.metrics.0.data.split")
for image_HWC, target_HW in pictures.squares(splits.train, size=224, check=check): ...
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from orchestrator.config.dense import DepthData, MaskData, PairData
from orchestrator.config.schema import MAX_PIXELS
from orchestrator.data.decode import UnreadableImage, read_header, read_rgb, square, upright_size
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.sources.masks import manifest_of, mask_pairs, mask_weights
from orchestrator.data.splits import Splits
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import open_regular, sha256_of

Pixels = NDArray[np.uint8]
Target = NDArray[np.float32] | NDArray[np.int64]

_AHEAD = 4
# Of one depth map: its median in metres is between these, whatever it shows.
_NEAREST, _FARTHEST = 0.05, 500.0
_SAMPLED = 8
# One bit, grey, palette, and 16 or 32 bits.
_FEW_BITS = ("1", "L", "P")
_MODES = (*_FEW_BITS, "I", "I;16", "I;16B")
_COPY = "copy it again"
# What a file holds decides, and no other decoder sees it: some of Pillow's start programs.
_PNG, _VIEWS = ("PNG",), ("PPM", "PNG", "JPEG")
# Nine numbers take less.
_MOST_OF_MATRIX = 1 << 16
# Numbers that are one metre: of most depth cameras, of KITTI, and of TUM's RGB-D sets.
_SCALES = (1000, 256, 5000)


class DensePictures:
    """The pictures of a data set with masks or depth, by row, and their targets.

    Args:
        data: which.

    Raises:
        UserError: a piece is missing, see :func:`orchestrator.config.dense.paired` and
            :func:`orchestrator.data.sources.masks.mask_pairs`, or NYUv2's file cannot be unpacked.
    """

    def __init__(self, data: MaskData | DepthData) -> None:
        if isinstance(data, DepthData):
            # Imports h5py if it is asked for.
            from orchestrator.data.nyuv2 import unpacked

            data = unpacked(data)
        self._data = data
        self._pairs = mask_pairs(data) if isinstance(data, MaskData) else data.pairs()

    def __len__(self) -> int:
        return len(self._pairs)

    def check(self) -> None:
        """Compare the sizes of pictures and targets, as their headers say, and look at the units of a few depth maps.

        Raises:
            UserError: a target of another size, of a kind that has no numbers, or depth in other units.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._check_sizes, range(len(self))))
        if isinstance(self._data, DepthData):
            for row in range(0, len(self), max(1, len(self) // _SAMPLED)):
                self._check_units(row, self._data)

    def index(self) -> ImageIndex:
        """The pictures as an index, whose rows are those of this."""
        root = self._data.path.resolve()
        weights = mask_weights(self._data) if isinstance(self._data, MaskData) else {}

        def record(row: int) -> ImageRecord:
            image = self._pairs[row][0]
            header = _header(root / image)
            return ImageRecord(
                root.name,
                image,
                str(root),
                sha256_of(root / image),
                header[0],
                header[1],
                weight=weights.get(image, 1.0),
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return ImageIndex(list(pool.map(record, range(len(self)))))

    def splits(self, where: str, stop: Callable[[], None] = lambda: None) -> Splits:
        """Rows by split; raises as :meth:`Splits.of`."""
        return Splits.of(self.index(), self._data.chosen_split(), where=where, stop=stop)

    def squares(
        self, rows: Sequence[int] | NDArray[np.integer], size: int, check: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[Pixels, Target]]:
        """The centred square of each picture at (size, size, 3), and that of its target at its own resolution.

        Classes are int64, -1 where they do not count; depth is float32 in metres, 0 where it does not count. A few
        are read ahead by threads, so memory does not grow with the number of pictures.
        """

        def one(row: int) -> tuple[Pixels, Target]:
            check()
            image_HWC, target_HW = self.read(row)
            return square(image_HWC, size), _middle(target_HW)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = []
            for row in rows:
                waiting.append(pool.submit(one, int(row)))
                if len(waiting) > _AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()

    def read(self, row: int) -> tuple[Pixels, Target]:
        """A picture and its target at full size, see :meth:`squares`.

        Raises:
            UserError: one of them cannot be read, or they are of different sizes.
        """
        image, target = (self._data.path / part for part in self._pairs[row])
        try:
            image_HWC = read_rgb(image)
        except UnreadableImage as error:
            raise _unreadable(image, error.reason) from error
        target_HW = self.target(row)
        if target_HW.shape != image_HWC.shape[:2]:
            with self._naming_masks(row):
                raise _other_size(image, target, image_HWC.shape[1::-1], target_HW.shape[::-1])
        return image_HWC, target_HW

    def target(self, row: int) -> Target:
        """The target of a picture alone, at full size, see :meth:`squares`; raises UserError if it cannot be read."""
        with self._naming_masks(row):
            values = png_numbers(self._data.path / self._pairs[row][1], self._is_depth)
        if isinstance(self._data, MaskData):
            classes = values.astype(np.int64)
            return np.where(classes == self._data.ignored, -1, classes)
        depth = (values / self._data.scale).astype(np.float32)
        return np.where(depth <= self._data.max_depth, depth, np.float32(0))

    def _check_sizes(self, row: int) -> None:
        image, target = (self._data.path / part for part in self._pairs[row])
        try:
            # As it is seen: a photo may be stored on its side, and its target is not.
            of_image = upright_size(image)
        except UnreadableImage as error:
            raise _unreadable(image, error.reason) from error
        with self._naming_masks(row):
            of_target = png_size(target, self._is_depth)
            if of_image != of_target:
                raise _other_size(image, target, of_image, of_target)

    @contextlib.contextmanager
    def _naming_masks(self, row: int) -> Iterator[None]:
        """Name the manifest, and not a file of the cache, in a mistake in a mask that the manifest holds."""
        picture, target = self._pairs[row]
        try:
            yield
        except UserError as error:
            # Only masks that come from a manifest are in the cache, and have paths that are absolute.
            if not isinstance(self._data, MaskData) or not Path(target).is_absolute():
                raise
            what = error.what.replace(Path(target).name, "it")
            raise UserError(
                f"the mask of {shortened(picture, 200)} in the manifest: {what}",
                where=str(manifest_of(self._data)),
                hint="write the mask into the manifest again" if error.hint == _COPY else error.hint,
            ) from error

    @property
    def _is_depth(self) -> bool:
        return isinstance(self._data, DepthData)

    def _check_units(self, row: int, data: DepthData) -> None:
        path = data.path / self._pairs[row][1]
        values = png_numbers(path, is_depth=True)
        there = values[values > 0]
        if not len(there):
            return
        median = float(np.median(there)) / data.scale
        if not _NEAREST <= median <= _FARTHEST or (there / data.scale <= data.max_depth).mean() < 0.01:
            middle = float(np.median(there))
            likely = [
                f"{scale} would make it {middle / scale:.3g} m"
                for scale in _SCALES
                if 0.3 < middle / scale < 30
            ]
            raise UserError(
                f"the median depth of {path.name} is {median:.3g} m with a `scale` of {data.scale:g}",
                where=str(path),
                hint="set `scale` to the number that is one metre"
                + (f" ({', '.join(likely)})" if likely else "")
                + ", or `max_depth` to the farthest that counts",
            )


def png_size(path: Path, is_depth: bool) -> tuple[int, int]:
    """Width and height of a target; raises UserError for what is not a PNG of one number for each pixel."""
    try:
        with Image.open(path, formats=_PNG) as image:
            size, mode = image.size, image.mode
    except UnidentifiedImageError as error:
        raise _unreadable(path, "it is not a PNG") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, str(error)) from error
    if is_depth and mode in _FEW_BITS:
        raise UserError(
            f"the depth map is a picture of mode {mode}, whose pixels have 8 bits or fewer",
            where=str(path),
            hint="save depth as a 16-bit grey PNG, not as a coloured or brightened picture for viewing",
        )
    if mode not in _MODES:
        raise UserError(
            f"the target is a picture of mode {mode}, not of one number for each pixel",
            where=str(path),
            hint="save it as a PNG in greys or with a palette, whose values are the numbers",
        )
    return size


def png_numbers(path: Path, is_depth: bool) -> NDArray[np.int64]:
    """The numbers of a target, (H, W); raises as :func:`png_size`."""
    _check_pixels(path, png_size(path, is_depth))
    try:
        with Image.open(path, formats=_PNG) as image:
            return np.asarray(image).astype(np.int64)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, str(error)) from error


def read_pair(data: PairData, pair: tuple[str, str, str]) -> tuple[Pixels, Pixels, NDArray[np.float64]]:
    """Both views of a pair at full size, and the homography (3, 3) from pixels of the first to pixels of the other.

    Raises:
        UserError: a file cannot be read, or holds no homography.
    """
    views = []
    for name in pair[:2]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                # HPatches has PPM files, which our own reader of photos does not take.
                with Image.open(data.path / name, formats=_VIEWS) as image:
                    _check_pixels(data.path / name, image.size)
                    views.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
            raise _unreadable(data.path / name, str(error)) from error
    path = data.path / pair[2]
    try:
        with open_regular(path) as file:
            matrix = np.loadtxt(io.BytesIO(file.read(_MOST_OF_MATRIX)), dtype=np.float64, max_rows=4)
    except (OSError, ValueError) as error:
        raise UserError(f"the homography cannot be read: {error}", where=str(path), hint=_MATRIX) from error
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        raise UserError(
            f"the homography has {'x'.join(map(str, matrix.shape))} numbers, or cannot be inverted",
            where=str(path),
            hint=_MATRIX,
        )
    return views[0], views[1], matrix


_MATRIX = "it is three lines of three numbers: pixels of the first view, as (x, y, 1), to those of the other"


def _middle(target_HW: Target) -> Target:
    """The centred square, as :func:`orchestrator.data.decode.square` cuts it, in full resolution."""
    height, width = target_HW.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return target_HW[top : top + side, left : left + side]


def _header(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is stored."""
    try:
        header = read_header(path)
    except UnreadableImage as error:
        raise _unreadable(path, error.reason) from error
    return header.width, header.height


def _check_pixels(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _unreadable(path, f"it has {size[0]}x{size[1]} pixels, more than {MAX_PIXELS:,}")


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"a file of the data set cannot be read: {why}", where=str(path), hint=_COPY)


def _other_size(image: Path, target: Path, of_image: Sequence[int], of_target: Sequence[int]) -> UserError:
    return UserError(
        f"{target.name} has {of_target[0]}x{of_target[1]} pixels, and its picture {image.name} "
        f"{of_image[0]}x{of_image[1]}",
        where=str(target),
        hint="a target has the size of its picture; scale it without mixing its numbers (nearest neighbour)",
    )
