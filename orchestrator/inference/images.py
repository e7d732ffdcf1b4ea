"""Images of any kind as the squares that models see, read by several threads ahead of the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.bands import seen
from orchestrator.data.decode import Pixels, UnreadableImage, read_square, rgb_of, square
from orchestrator.data.read_ahead import in_order
from orchestrator.data.sources.folder import shown
from orchestrator.errors import UserError, first_line, shortened

# A path, a PIL image, or uint8 RGB (H, W, 3).
ImageLike = str | Path | Image.Image | Pixels

_RGB = 3


# More threads than that decode no faster than a model embeds, and each holds a picture.
_MOST_LOADERS = 8


def default_loaders() -> int:
    """The number of threads that read images unless the user says: one for each core that this process may use."""
    return min(_MOST_LOADERS, len(os.sched_getaffinity(0)))


def square_of(image: ImageLike, size: int, pixels: PixelFormat | None = None) -> Pixels:
    """The centred square of an image, (size, size, C). A file is read as in evaluation.

    Args:
        image: a path, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4). For a model of other than three
            channels an array has all bands of a file, (H, W, bands), in any type.
        size: pixels a side.
        pixels: how the values of files and of Pillow's images are seen, and those of arrays for such a model; other
            arrays are taken as they are.

    Raises:
        UserError: a file that is not an image, or something else.
    """
    try:
        if isinstance(image, (str, os.PathLike)):
            return read_square(Path(image), size, pixels=pixels)
        if isinstance(image, np.ndarray) and pixels is not None and pixels.num_channels != _RGB:
            if image.ndim != 3 or image.dtype.kind not in "uif":
                raise TypeError(
                    f"it is an array of {image.dtype} {image.shape}, not of numbers (H, W, bands)"
                )
            return square(seen(image, pixels, "the array"), size)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
                raise TypeError(f"it is an array of {image.dtype} {image.shape}, not of uint8 (H, W, 3)")
            if image.ndim == 3 and image.shape[2] == 3:
                return square(image, size)
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"it is of type {type(image).__name__}")
        if 0 in image.size:
            raise ValueError(f"it has {image.width} × {image.height} pixels")
        return square(rgb_of(image, pixels), size)
    except (UnreadableImage, OSError, ValueError, TypeError) as error:
        reason = error.reason if isinstance(error, UnreadableImage) else first_line(error)
        where = shown(str(image)) if isinstance(image, (str, os.PathLike)) else None
        if isinstance(error.__cause__ or error, FileNotFoundError):
            hint = None if Path(str(image)).is_absolute() else f"the path is taken from {Path.cwd()}"
            raise UserError("no such file", where=where, hint=hint) from error
        raise UserError(f"this is not an image: {shortened(reason, 200)}", where=where) from error


def squares_of(
    images: Sequence[ImageLike], size: int, batch: int, loaders: int, pixels: PixelFormat | None = None
) -> Iterator[list[Pixels]]:
    """Batches of :func:`square_of` of all images, in order; raises as it."""
    read = partial(square_of, size=size, pixels=pixels)
    if len(images) <= 1:
        # No thread is worth starting for one.
        yield from ([read(image)] for image in images)
        return
    found = in_order(read, images, loaders, ahead=2 * batch)
    while taken := list(islice(found, batch)):
        yield taken
