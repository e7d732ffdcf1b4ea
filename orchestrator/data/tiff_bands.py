"""TIFF files of any number of bands, which neither Pillow nor OpenCV reads: TIFF 6.0, and BigTIFF.

A strip or a tile is compressed bytes, whatever they stand for. So each is given to Pillow's libtiff as a grey picture
of 8 bits, whose pixels are those bytes, and its values are put together here. That covers every lossless compression
that Pillow's build has (none, LZW, Deflate, PackBits, Zstandard, LZMA).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Numbers of tags, as the specification has them.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL = 256, 257, 258, 259, 266
_STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES = 273, 277, 278, 279
_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT = (
    284,
    317,
    322,
    323,
    324,
    325,
    339,
)
# How values of each type of a tag are packed; those that do not count here are left out.
_TYPES = {1: "B", 3: "H", 4: "L", 16: "Q"}
_MOST_TAGS = 4096
_READ = frozenset(
    (
        _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _FILL, _STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR,
        _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT,
    )
)  # fmt: skip
# Numbers of one tag: strips of a single row, for each of hundreds of bands.
_MOST_NUMBERS = 2**22
# Bytes that the values of a picture may always take, and for each pixel that pictures may have.
_ALWAYS, _BYTES_PER_PIXEL = 2**31, 16
_NONE, _LZW, _DEFLATE, _OLD_DEFLATE, _PACKBITS, _LZMA, _ZSTD = 1, 5, 8, 32946, 32773, 34925, 50000
_COMPRESSIONS = (_NONE, _LZW, _DEFLATE, _OLD_DEFLATE, _PACKBITS, _LZMA, _ZSTD)
_HORIZONTAL, _FLOATING = 2, 3
_KINDS = {
    (1, 8): "u1",
    (1, 16): "u2",
    (1, 32): "u4",
    (2, 16): "i2",
    (2, 32): "i4",
    (3, 32): "f4",
    (3, 64): "f8",
}


@dataclass(frozen=True)
class TiffHeader:
    """The first picture of a TIFF file: its tags by number, and the order of bytes, "<" or ">"."""

    order: str
    tags: Mapping[int, tuple[int, ...]]

    def one(self, tag: int, default: int | None = None) -> int:
        """The first number of a tag.

        Raises:
            ValueError: it has none, and there is no default.
        """
        found = self.tags.get(tag) or (() if default is None else (default,))
        if not found:
            raise ValueError(f"the TIFF file lacks the tag {tag}")
        return found[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.one(_WIDTH), self.one(_HEIGHT)

    @property
    def bands(self) -> int:
        return self.one(_SAMPLES, 1)

    @property
    def bits(self) -> int:
        """Of a value of the first band."""
        return self.one(_BITS, 1)

    @property
    def num_bytes(self) -> int:
        """Of all values, uncompressed.

        Raises:
            ValueError: it does not say how large it is.
        """
        width, height = self.size
        return width * height * self.bands * -(-self.bits // 8)

    @property
    def is_for_us(self) -> bool:
        """Whether Pillow and OpenCV cannot read it: the number of its bands, or the type of their values."""
        formats = self.one(_FORMAT, 1)
        wide = self.bits > 16 or formats != 1
        return self.bands > 4 or (self.bands == 2 and self.bits > 8) or (self.bands > 1 and wide)


def most_bytes_of_values(max_pixels: int) -> int:
    """How many bytes the values of a picture may take, where pictures may have so many pixels."""
    return max(_ALWAYS, _BYTES_PER_PIXEL * max_pixels)


def tiff_header(data: bytes | BinaryIO, size: int | None = None) -> TiffHeader | None:
    """What a file says of its first picture; None where it does not say it as the specification has it.

    Args:
        data: the file, or the open file, of which only the header is read: it may lie anywhere.
        size: bytes of an open file.
    """
    read = _reader(data, size)
    try:
        head = read(0, 16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None:
            return None
        (version,) = struct.unpack_from(f"{order}H", head, 2)
        if version == 43:
            (start,) = struct.unpack_from(f"{order}Q", head, 8)
            (count,) = struct.unpack(f"{order}Q", read(start, 8))
            return TiffHeader(order, _tags(read, order, start + 8, count, big=True))
        (start,) = struct.unpack_from(f"{order}L", head, 4)
        (count,) = struct.unpack(f"{order}H", read(start, 2))
        return TiffHeader(order, _tags(read, order, start + 2, count, big=False))
    except (struct.error, ValueError):
        return None


def _reader(data: bytes | BinaryIO, size: int | None) -> Callable[[int, int], bytes]:
    """Reads so many bytes from a place on, which a file may have made up; raises ValueError behind its end."""
    length = len(data) if isinstance(data, bytes) else size or 0

    def read(at: int, count: int) -> bytes:
        if at + count > length:
            raise ValueError("the file is truncated")
        if isinstance(data, bytes):
            return data[at : at + count]
        data.seek(at)
        return data.read(count) or b""

    return read


def _tags(
    read: Callable[[int, int], bytes], order: str, start: int, count: int, *, big: bool
) -> dict[int, tuple[int, ...]]:
    """The tags that are needed here; of one that is there twice the first."""
    if count > _MOST_TAGS:
        raise ValueError(f"{count} tags")
    entry, inline, number = (20, 8, "Q") if big else (12, 4, "L")
    directory = read(start, entry * count)
    tags: dict[int, tuple[int, ...]] = {}
    for at in range(0, entry * count, entry):
        tag, kind, amount = struct.unpack_from(f"{order}HH{number}", directory, at)
        if kind not in _TYPES or tag not in _READ or tag in tags:
            continue
        if amount > _MOST_NUMBERS:
            raise ValueError(f"the tag {tag} has {amount} numbers")
        packed = f"{order}{amount}{_TYPES[kind]}"
        size, where = struct.calcsize(packed), at + entry - inline
        found = directory[where : where + size]
        if size > inline:
            (where,) = struct.unpack_from(f"{order}{number}", directory, where)
            found = read(where, size)
        tags[tag] = struct.unpack(packed, found)
    return tags


def tiff_values(data: bytes, header: TiffHeader, max_pixels: int) -> NDArray[Any]:
    """The values of the first picture.

    Args:
        data: the file.
        header: of it.
        max_pixels: the most pixels that a picture may have, and a tile; see :func:`most_bytes_of_values`, too.

    Returns:
        (H, W, bands), in the type of the file and the order of bytes of this machine.

    Raises:
        ValueError: values of a type, or a compression, that is not read; or the file is not whole.
    """
    width, height = header.size
    bands, bits = header.bands, header.bits
    kind = _KINDS.get((header.one(_FORMAT, 1), bits))
    if kind is None or len(set(header.tags.get(_BITS, ()))) > 1 or len(set(header.tags.get(_FORMAT, ()))) > 1:
        raise ValueError(
            f"{bands} bands of {bits} bits and sample format {header.one(_FORMAT, 1)} are not read"
        )
    if header.one(_COMPRESSION, _NONE) not in _COMPRESSIONS or header.one(_FILL, 1) != 1:
        raise ValueError(f"the compression {header.one(_COMPRESSION)} of a TIFF of {bands} bands is not read")
    tiled = _TILES in header.tags
    columns = header.one(_TILE_WIDTH) if tiled else width
    rows = header.one(_TILE_HEIGHT) if tiled else min(header.one(_STRIP_ROWS, height), height)
    if min(width, height, columns, rows, bands) < 1 or columns * rows > max(max_pixels, width * height):
        raise ValueError(f"tiles of {columns} × {rows} pixels in a picture of {width} × {height}")
    apart = header.one(_PLANAR, 1) == 2
    starts = header.tags.get(_TILES if tiled else _STRIPS, ())
    sizes = header.tags.get(_TILE_BYTES if tiled else _STRIP_BYTES, ())
    across, down = -(-width // columns), -(-height // rows)
    # Tiles are decoded whole, however little of them the picture has.
    if across * columns * down * rows * bands * (bits // 8) > most_bytes_of_values(max_pixels):
        raise ValueError(
            f"{width} × {height} pixels of {bands} bands in tiles of {columns} × {rows} are too large"
        )
    if len(starts) != len(sizes) or len(starts) != across * down * (bands if apart else 1):
        raise ValueError(f"it has {len(starts)} strips or tiles, and says the size of {len(sizes)}")
    values_HWC = np.zeros((height, width, bands), kind)
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        plane, place = divmod(number, across * down)
        top, left = place // across * rows, place % across * columns
        # The last strip has the rows that are left; a tile is whole.
        tall = rows if tiled else min(rows, height - top)
        depth = 1 if apart else bands
        if size == 0:
            continue  # a part that was never written, as GDAL leaves it: zeros
        if start + size > len(data):
            raise ValueError("the file is truncated")
        found = _segment(data[start : start + size], header, kind, (tall, columns, depth))
        part = values_HWC[top : top + tall, left : left + columns, plane : plane + depth if apart else None]
        part[...] = found[: part.shape[0], : part.shape[1]]
    return values_HWC


def _segment(data: bytes, header: TiffHeader, kind: str, shape: tuple[int, int, int]) -> NDArray[Any]:
    """A strip or tile (rows, columns, bands of it), with its predictor undone."""
    rows, columns, depth = shape
    stored = np.dtype(header.order + kind)
    width = columns * depth * stored.itemsize
    raw_RB = _bytes_of(data, header.one(_COMPRESSION, _NONE), width, rows)
    predictor = header.one(_PREDICTOR, 1)
    if predictor == _FLOATING:
        # Technical note 3 of Adobe: differences of bytes, and the first bytes of all values come first.
        sums_RXD = raw_RB.reshape(rows, -1, depth).cumsum(axis=1, dtype=np.uint8)
        planes = sums_RXD.reshape(rows, stored.itemsize, columns * depth).transpose(0, 2, 1)
        found = np.ascontiguousarray(planes).view(f">{kind}")
        return found.reshape(shape)
    values = np.ascontiguousarray(raw_RB).view(stored).reshape(shape)
    if predictor == _HORIZONTAL:
        native = values.astype(kind)
        whole = native.view(f"u{stored.itemsize}")  # differences wrap around
        return whole.cumsum(axis=1, dtype=whole.dtype).view(native.dtype)
    if predictor != 1:
        raise ValueError(f"the predictor {predictor} is not read")
    return values


def _bytes_of(data: bytes, compression: int, width: int, rows: int) -> NDArray[np.uint8]:
    """Uncompressed bytes (rows, width)."""
    if compression == _NONE:
        if len(data) < width * rows:
            raise ValueError("the file is truncated")
        return np.frombuffer(data, np.uint8, width * rows).reshape(rows, width)
    tags = [
        (_WIDTH, width), (_HEIGHT, rows), (_BITS, 8), (_COMPRESSION, compression), (262, 1), (_STRIPS, 0),
        (_SAMPLES, 1), (_STRIP_ROWS, rows), (_STRIP_BYTES, len(data)),
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHLL", tag, 4, 1, start if tag == _STRIPS else value) for tag, value in tags
    )
    file = b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + b"\0\0\0\0" + data
    with Image.open(io.BytesIO(file), formats=["TIFF"]) as image:
        return np.asarray(image)
