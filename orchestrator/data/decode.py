"""Image files to pixels: upright, three channels, eight bits, whatever the file is; sixteen if `pixels` says so.

Files come from anywhere. So only the formats of :data:`image_formats.FORMATS` are decoded, whatever a name ends in; the
size that a file claims is compared with a limit before any pixel is; and threads share a bounded amount of memory.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import MAX_PIXELS
from orchestrator.data.bands import seen, square_of_bands
from orchestrator.data.decoding_memory import SHARED_BYTES, SharedMemory

# Who reads pictures catches it from here.
from orchestrator.data.image_formats import UnreadableImage as UnreadableImage
from orchestrator.data.image_formats import format_of, too_large, too_many_bytes, webp_size
from orchestrator.data.jpeg import BENIGN_JPEG, EXIF_ORIENTATION, decode_jpeg, upright
from orchestrator.data.sources.account import ACCESS, BANDS, NOT_A_PICTURE, TOO_LARGE
from orchestrator.data.sources.shard_members import open_member
from orchestrator.data.tiff_bands import TiffHeader, most_bytes_of_values, tiff_header, tiff_values
from orchestrator.fsio import open_regular, why
from orchestrator.storage.s3_client import StoreError

T = TypeVar("T")
Pixels = NDArray[np.uint8]

# Pillow's modes of one band of more than 8 bits.
_WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TIFF_TILE = (0x0142, 0x0143)  # width and length
_TIFF_BITS = 0x0102
_TIFF_SAMPLES = 0x0115
# Where the header of a PNG says how many bits a channel has.
_PNG_BITS = 24
# The memory that one pixel takes while a picture is decoded, in bytes: Pillow's four, as many for compositing
# transparency, and the result; libjpeg keeps the coefficients of a progressive JPEG.
_BYTES_PER_PIXEL = 16
# Of a band of a file of many: as it is in the file, as a share of white, and as the model sees it.
_BYTES_PER_VALUE = 10
# A file of this size is read before its header is known. A larger one counts as the largest picture that may be.
_SMALL_FILE = 16 << 20
# What tells the format, the size of a WebP and the bits of a PNG.
_HEADER_BYTES = 64

_memory = SharedMemory(SHARED_BYTES)


@dataclass(frozen=True)
class Header:
    """What an image file says of itself: pixels as stored, which may lie on their side, and bits of a channel."""

    width: int
    height: int
    bits: int


def read_rgb(
    path: Path | str,
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    pixels: PixelFormat | None = None,
) -> Pixels:
    """The pixels of an image file.

    Transparency is composited on white, 16-bit values keep their high byte, EXIF orientation is applied and
    animations give their first frame; `pixels` says otherwise, for all files of a dataset alike.

    Args:
        path: the file.
        min_side: large JPEGs may be decoded at 1/2, 1/4 or 1/8 as long as both sides stay at least this many
            pixels (several times faster); other formats ignore it.
        max_pixels: the largest width × height that the file may have.
        pixels: the bands that are seen and the range of their values.

    Returns:
        (H, W, 3) uint8, RGB, contiguous; uint16 where `pixels.is_deep`, 0 black and 65535 white; as many channels as
        `pixels.num_channels`.

    Raises:
        UnreadableImage: missing, not a regular file, not an image of one of :data:`image_formats.FORMATS`, too large,
            truncated or corrupt.
    """
    return use_rgb(path, lambda image: image, min_side, max_pixels, pixels=pixels)


def use_rgb(
    path: Path | str,
    use: Callable[[Pixels], T],
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_bytes: Callable[[bytes], None] = lambda data: None,
    pixels: PixelFormat | None = None,
    on_wide: Callable[[int], None] = lambda peak: None,
) -> T:
    """What `use` makes of the pixels of an image file; as :func:`read_rgb` otherwise.

    The picture's memory counts among what threads share until `use` returns; `use` must not read another picture.
    `on_bytes` gets the file's content before it is looked at; `on_wide` the largest value of a file of 16 bits, where
    `pixels` names no range and so the high byte is taken.
    """
    with _reading(path):
        member = open_member(path)
        file = open_regular(path) if member is None else member[0]
    with file:
        with _reading(path):
            size = os.fstat(file.fileno()).st_size if member is None else member[1]
        if (reason := too_many_bytes(size, max_pixels)) is not None:
            raise UnreadableImage(path, reason, TOO_LARGE)
        if size > _SMALL_FILE:
            with _memory.hold(size + _BYTES_PER_PIXEL * max_pixels):
                with _reading(path):
                    data = _read(file, size)
                on_bytes(data)
                return use(decode_rgb(data, path, min_side, max_pixels, pixels, on_wide))
        with _reading(path):
            data = _read(file, _SMALL_FILE)
    on_bytes(data)
    with _memory.hold(_bytes_per_pixel(data) * _num_pixels(data, path, max_pixels)):
        return use(_decode(data, path, min_side, max_pixels, pixels, on_wide))


def read_header(path: Path | str, max_pixels: int = MAX_PIXELS) -> Header:
    """The header of an image file. No pixel is decoded, so the rest of the file may be damaged.

    Raises:
        UnreadableImage: missing, not a regular file, not an image of one of :data:`image_formats.FORMATS`, or too
            large.
    """
    with _reading(path):
        member = open_member(path)
        file = open_regular(path) if member is None else member[0]
    with file:
        with _reading(path):
            size = os.fstat(file.fileno()).st_size if member is None else member[1]
            start = _read(file, _HEADER_BYTES)
        if (reason := too_many_bytes(size, max_pixels)) is not None:
            raise UnreadableImage(path, reason, TOO_LARGE)
        kind, bits = format_of(start, path), 8
        header = _header_of_bands(file, size, path, kind)
        if header is not None:
            (width, height), bits = _size_of(path, header, max_pixels), header.bits
        elif kind == "WEBP":
            width, height = webp_size(start)
        else:
            with _opened(file, path, kind, max_pixels) as image:
                width, height = image.size
                if kind == "TIFF":
                    bits = _tiff_bits(image)
        if kind == "PNG" and len(start) > _PNG_BITS:
            bits = start[_PNG_BITS]
    if width * height > max_pixels:
        raise UnreadableImage(path, too_large(width, height, max_pixels), TOO_LARGE)
    return Header(width, height, bits)


def _header_of_bands(file: io.BufferedReader, size: int, path: Path | str, kind: str) -> TiffHeader | None:
    """As :func:`_of_bands`, of an open file of `size` bytes, which is left as it was."""
    if kind != "TIFF":
        return None
    with _reading(path):
        at = file.tell()
        header = tiff_header(file, size)
        file.seek(at)
    return header if header is not None and header.is_for_us else None


def upright_size(path: Path | str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image as :func:`read_rgb` gives it, from its header; raises as :func:`read_header`."""
    header = read_header(path, max_pixels)
    size = header.width, header.height
    if size[0] == size[1]:
        return size
    with _reading(path):
        member = open_member(path)
        file = open_regular(path) if member is None else member[0]
    with file:
        with _reading(path):
            kind = format_of(_read(file, _HEADER_BYTES), path)
            num_bytes = os.fstat(file.fileno()).st_size if member is None else member[1]
            if _header_of_bands(file, num_bytes, path, kind) is not None:
                return size  # as it lies in the file
            file.seek(0)
        with _opened(file, path, kind, max_pixels) as image:
            try:
                turned = int(image.getexif().get(EXIF_ORIENTATION, 1)) in (5, 6, 7, 8)
            except Exception:  # as when the pixels are read: malformed metadata must not cost a good picture
                turned = False
    return size[::-1] if turned else size


def _tiff_bits(image: Image.Image) -> int:
    """The bits of its first channel; 8 where it does not say so as a number."""
    found = getattr(image, "tag_v2", {}).get(_TIFF_BITS, 8)
    first = found[0] if isinstance(found, tuple) and found else found
    return first if isinstance(first, int) else 8


def square(pixels_HWC: Pixels, size: int) -> Pixels:
    """The centre of a picture, (size, size, C): shorter side resized to `size` (bicubic, antialiased), cropped.

    Raises:
        ValueError: the picture has no pixels.
    """
    if 0 in pixels_HWC.shape:
        raise ValueError("it has no pixels")
    if pixels_HWC.dtype == np.uint8 and pixels_HWC.shape[2] == 3:
        return np.asarray(ImageOps.fit(Image.fromarray(pixels_HWC), (size, size), Image.Resampling.BICUBIC))
    return square_of_bands(pixels_HWC, size)


def read_square(
    path: Path | str,
    size: int,
    max_pixels: int = MAX_PIXELS,
    on_bytes: Callable[[bytes], None] = lambda data: None,
    pixels: PixelFormat | None = None,
) -> Pixels:
    """The centred square of an image file: what models see in evaluation, in embedding and in search.

    Args:
        path: the file.
        size: pixels a side.
        max_pixels, on_bytes, pixels: see :func:`use_rgb`.

    Returns:
        (size, size, 3) uint8, RGB; uint16 where `pixels.is_deep`; as many channels as `pixels` says.

    Raises:
        UnreadableImage: as :func:`read_rgb`.
    """

    def cut(pixels_HWC: Pixels) -> Pixels:
        try:
            return square(pixels_HWC, size)
        except ValueError as error:
            raise UnreadableImage(path, str(error)) from error

    # JPEGs decoded at twice the side leave the resampling of large photos to the antialiased bicubic filter.
    return use_rgb(path, cut, 2 * size, max_pixels, on_bytes, pixels)


def rgb_of(image: Image.Image, pixels: PixelFormat | None = None) -> Pixels:
    """The pixels of an image that Pillow has opened, by the rules of :func:`read_rgb`.

    Raises:
        UnreadableImage: it is broken, or its values have no defined range.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if pixels is None and image.mode not in _WIDE_MODES:
            return _to_rgb(image)
        return seen(_values(image), pixels, "the image")
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow decodes late, and its plugins raise anything
        raise UnreadableImage("the image", str(error)[:200] or type(error).__name__) from error


def _read(file: io.BufferedReader, most: int) -> bytes:
    """The first bytes of a file, or all: it may have grown since its size was asked for."""
    data: bytes | None = file.read(most)
    if data is None:  # a file that waits for what comes next, such as /proc/kmsg
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return data


@contextlib.contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """What the system says of a file as `UnreadableImage`. Around nothing else: `use` may meet a full disk.

    A server that does not answer, after all tries, says nothing of the picture: that goes through as it is.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise UnreadableImage(path, why(error), ACCESS) from error


def decode_rgb(
    data: bytes,
    path: Path | str,
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
    pixels: PixelFormat | None = None,
    on_wide: Callable[[int], None] = lambda peak: None,
) -> Pixels:
    """Like :func:`use_rgb` for the bytes of a file; `path` is for the error message."""
    _num_pixels(data, path, max_pixels)
    return _decode(data, path, min_side, max_pixels, pixels, on_wide)


def _decode(
    data: bytes,
    path: Path | str,
    min_side: int | None,
    max_pixels: int,
    pixels: PixelFormat | None,
    on_wide: Callable[[int], None],
) -> Pixels:
    """The pixels of a file whose claimed size was found small enough."""
    kind = format_of(data, path)
    if kind == "JPEG":
        decoded = decode_jpeg(data, path, min_side)
        if decoded is not None:
            return decoded if pixels is None else seen(decoded, pixels, path)
    if (header := _of_bands(data, kind)) is not None:
        return seen(_band_values(data, path, header, max_pixels), pixels, path, on_wide)
    with _opened(data, path, kind, max_pixels) as image:
        is_wide = _is_wide(data, kind, image)
        if pixels is None and not is_wide:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
        return seen(_raw(data, path, image, is_wide), pixels, path, on_wide)


def _of_bands(data: bytes, kind: str) -> TiffHeader | None:
    """The header of a TIFF whose bands neither Pillow nor OpenCV reads; None of any other file."""
    header = tiff_header(data) if kind == "TIFF" else None
    return header if header is not None and header.is_for_us else None


def _band_values(data: bytes, path: Path | str, header: TiffHeader, max_pixels: int) -> NDArray[Any]:
    try:
        return tiff_values(data, header, max_pixels)
    except Exception as error:  # Pillow decodes the parts, and raises anything
        raise UnreadableImage(path, str(error)[:200] or type(error).__name__) from error


def _is_wide(data: bytes, kind: str, image: Image.Image) -> bool:
    """Whether a channel has more than 8 bits."""
    if kind == "PNG" and len(data) > _PNG_BITS:
        return data[_PNG_BITS] > 8
    return image.mode in _WIDE_MODES or (kind == "TIFF" and _tiff_bits(image) > 8)


def _raw(data: bytes, path: Path | str, image: Image.Image, is_wide: bool) -> NDArray[Any]:
    """The values as they are in the file, upright: (H, W) or (H, W, bands)."""
    # Also where another library decodes: Pillow tells what is truncated.
    image.load()
    samples = int(getattr(image, "tag_v2", {}).get(_TIFF_SAMPLES, 1))
    if (is_wide and image.mode not in _WIDE_MODES) or samples > len(image.getbands()):
        import cv2  # takes a moment to import, and few files need it

        # Of several bands of 16 bits Pillow keeps the high bytes, and of four bands three.
        orientation = int(image.getexif().get(EXIF_ORIENTATION, 1))
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None:
            raise UnreadableImage(path, f"{image.mode} of more than 8 bits cannot be decoded", BANDS)
        if found.ndim == 3 and found.shape[2] >= 3:
            found = np.concatenate([found[:, :, 2::-1], found[:, :, 3:]], axis=2)
        return upright(np.asarray(found), orientation)
    return _values(ImageOps.exif_transpose(image))


def _values(image: Image.Image) -> NDArray[Any]:
    """The values of a loaded image: grey, RGB, or as many bands as it has."""
    if image.mode in ("P", "PA", "RGBa", "La"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return np.asarray(image)


def _num_pixels(data: bytes, path: Path | str, max_pixels: int) -> int:
    """Width × height by the file's header, at most `max_pixels`; nothing is decoded."""
    kind = format_of(data, path)
    if kind == "JPEG":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            if not BENIGN_JPEG.search(str(error)):
                raise UnreadableImage(path, f"corrupt JPEG: {error}") from error
            width, height = _pillow_size(data, path, kind, max_pixels)
    else:
        header = _of_bands(data, kind)
        if header is not None:
            width, height = _size_of(path, header, max_pixels)
        elif kind == "WEBP":
            # Pillow's decoder makes room for the whole canvas as soon as it opens a file.
            width, height = webp_size(data)
        else:
            width, height = _pillow_size(data, path, kind, max_pixels)
    if width * height > max_pixels:
        raise UnreadableImage(path, too_large(width, height, max_pixels), TOO_LARGE)
    return int(width * height)


def _size_of(path: Path | str, header: TiffHeader, max_pixels: int) -> tuple[int, int]:
    try:
        (width, height), num_bytes = header.size, header.num_bytes
    except ValueError as error:
        raise UnreadableImage(path, str(error)) from error
    if width * height <= max_pixels and num_bytes > (most := most_bytes_of_values(max_pixels)):
        what = f"{width:,} × {height:,} pixels of {header.bands:,} bands take {num_bytes:,} bytes"
        raise UnreadableImage(path, f"{what}, more than the limit of {most:,}", TOO_LARGE)
    return width, height


def _bytes_per_pixel(data: bytes) -> int:
    """The memory that a pixel takes while this file is decoded."""
    header = tiff_header(data)
    return max(_BYTES_PER_PIXEL, _BYTES_PER_VALUE * header.bands if header is not None else 0)


def _pillow_size(data: bytes, path: Path | str, kind: str, max_pixels: int) -> tuple[int, int]:
    with _opened(data, path, kind, max_pixels) as image:
        return image.size


@contextlib.contextmanager
def _opened(data: bytes | BinaryIO, path: Path | str, kind: str, max_pixels: int) -> Iterator[Image.Image]:
    """The file as Pillow's image of one format, with its header read."""
    # Pillow's own limit is one number for the whole process, and may only be in the way of a higher one.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            # Pictures between one and two times Pillow's bomb limit are legal; beyond, it raises.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=[kind]) as image:
                if kind == "TIFF":
                    _check_tiles(image, path, max_pixels)
                yield image
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImage(path, f"more pixels than the limit of {max_pixels:,}", TOO_LARGE) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, f"begins like a {kind}, but is not one", NOT_A_PICTURE) from error
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        raise UnreadableImage(path, str(error)[:200] or type(error).__name__) from error


def _check_tiles(image: Image.Image, path: Path | str, max_pixels: int) -> None:
    """A tile is decoded whole, however small the picture is."""
    tags = getattr(image, "tag_v2", {})
    width, length = (int(tags.get(tag, 0)) for tag in _TIFF_TILE)
    if width * length > max_pixels:
        raise UnreadableImage(
            path, f"tiles of {width:,} × {length:,} pixels are more than {max_pixels:,}", TOO_LARGE
        )


def _to_rgb(image: Image.Image) -> Pixels:
    """The pixels of a loaded image of at most 8 bits a channel."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), dtype=np.uint8, order="C")
