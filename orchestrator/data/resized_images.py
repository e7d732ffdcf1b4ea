"""Images that were decoded once and resized: later epochs read them from the cache of the machine.

A phone's photograph of 12 megapixels takes longer to decode than all its crops take to make. So it is resized once, as
far as crops have use for its pixels, and kept. The pixels are the same whether they were kept before or are made now.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.curation.signatures import decoder_versions
from orchestrator.data.decode import Pixels, decode_rgb, use_rgb
from orchestrator.data.image_cache import ImageCache, opened
from orchestrator.data.index import ImageRecord
from orchestrator.data.sources.remote import is_remote

T = TypeVar("T")

# Raised when images are resized or kept in another way.
_FORMAT = 1
_KEY_BYTES = 16
# What was kept: a JPEG of the resized pixels, the pixels themselves, or the file.
_JPEG, _PIXELS, _FILE = b"J", b"P", b"F"
# Bytes of a value, height, width, bands.
_SHAPE = struct.Struct("<BIIH")
# With colours at full size: a tenth of the bytes of the pixels, and a quarter of PNG's bytes and time (docs/photos.md).
_QUALITY = 95
# The longest side that libjpeg writes.
_LONGEST = 65_500


class ResizedImages:
    """Reads images whose shorter side is above `side` at that size, and others as they are.

    The shorter side, since it bounds how many pixels a crop has: one of a share s of the area has at least s · `side`²,
    whatever the shape of the image.

    Args:
        side: pixels of the shorter side.
        cache: where they are kept.
    """

    def __init__(self, side: int, cache: ImageCache) -> None:
        self._side, self._cache = side, cache
        self._made_by = [_FORMAT, *decoder_versions()]

    @classmethod
    def opened(cls, side: int | None, limit_gib: float) -> ResizedImages | None:
        """As a stage's `cached_side` and `image_cache_gib` say; None where images are not resized."""
        return None if side is None else cls(side, opened(limit_gib))

    def use(
        self,
        record: ImageRecord,
        path: Path,
        use: Callable[[Pixels], T],
        min_side: int | None,
        pixels: PixelFormat | None,
    ) -> T:
        """What `use` makes of the pixels of an image; see :func:`orchestrator.data.decode.use_rgb`.

        A file that is not the one that was indexed any more is not kept.

        Args:
            record: the image.
            path: where its file is now.
            use: see above.
            min_side: an image that was resized to more pixels may be decoded at a smaller scale, too.
            pixels: how its values are seen.

        Raises:
            UnreadableImage: it is not kept, and its file cannot be read.
        """
        is_small, limit = min(record.width, record.height) <= self._side, record.max_pixels
        if is_small and not is_remote(path):
            return use_rgb(path, use, min_side, limit, pixels=pixels)
        key = self._key(record, pixels)
        kept = self._cache.get(key)
        if kept is None:
            kept, is_same = _made(path, self._side, limit, pixels, record.sha256, is_small=is_small)
            if is_same:
                self._cache.put(key, kept)
        return use(_unpacked(kept, path, min_side, limit, pixels))

    def pop_troubles(self) -> list[str]:
        """See :meth:`ImageCache.pop_troubles`."""
        return self._cache.pop_troubles()

    def _key(self, record: ImageRecord, pixels: PixelFormat | None) -> bytes:
        """Of all that decides the pixels: the file's content, the settings, and the libraries."""
        seen = None if pixels is None else [pixels.bands, pixels.range]
        text = json.dumps([self._made_by, record.sha256, self._side, seen])
        return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest()


def _made(
    path: Path, side: int, limit: int, pixels: PixelFormat | None, sha256: str, *, is_small: bool
) -> tuple[bytes, bool]:
    """What is to be kept of a file, and whether the file has this sha256."""
    found: list[bytes] = []
    if is_small:
        # Decoded here, so that a file that cannot be read is never kept.
        use_rgb(path, lambda image: None, side, limit, found.append, pixels)
        return _FILE + found[0], hashlib.sha256(found[0]).hexdigest() == sha256
    digests: list[str] = []

    def packed(image_HWC: Pixels) -> bytes:
        return _packed(resized_to(image_HWC, side), pixels)

    def note(data: bytes) -> None:
        digests.append(hashlib.sha256(data).hexdigest())

    # At twice the side, so that the filter and not the decoder decides how much detail is left: within 3 % of all.
    return use_rgb(path, packed, 2 * side, limit, note, pixels), digests[0] == sha256


def resized_to(image_HWC: Pixels, side: int) -> Pixels:
    """An image with its shorter side at most `side`, (H, W, C), of its type; bicubic, antialiased.

    Bands do not mix, and those of 16 bits keep 16 bits.
    """
    height, width, bands = image_HWC.shape
    if min(height, width) <= side:
        return image_HWC
    size = max(1, round(width * side / min(height, width))), max(1, round(height * side / min(height, width)))
    if image_HWC.dtype == np.uint8 and bands == 3:
        return np.asarray(Image.fromarray(image_HWC).resize(size, Image.Resampling.BICUBIC))
    made = np.empty((size[1], size[0], bands), image_HWC.dtype)
    most = np.iinfo(image_HWC.dtype).max
    for band in range(bands):
        # Pillow resizes one band of fractions; float32 has all values of 16 bits.
        plane_HW = Image.fromarray(np.ascontiguousarray(image_HWC[:, :, band], np.float32))
        resized = np.asarray(plane_HW.resize(size, Image.Resampling.BICUBIC))
        made[:, :, band] = np.rint(resized).clip(0, most)
    return made


def _packed(image_HWC: Pixels, pixels: PixelFormat | None) -> bytes:
    is_colour = pixels is None or pixels.is_colour
    if image_HWC.dtype == np.uint8 and is_colour and max(image_HWC.shape) <= _LONGEST:
        image_HWC = np.ascontiguousarray(image_HWC)
        encoded: bytes = simplejpeg.encode_jpeg(image_HWC, _QUALITY, "RGB", "444")
        return _JPEG + encoded
    # A JPEG has 8 bits, and takes three bands for colours, of which eyes see some less well.
    return _PIXELS + _SHAPE.pack(image_HWC.itemsize, *image_HWC.shape) + image_HWC.tobytes()


def _unpacked(
    kept: bytes, path: Path, min_side: int | None, limit: int, pixels: PixelFormat | None
) -> NDArray[Any]:
    kind, data = kept[:1], kept[1:]
    if kind == _FILE:
        return decode_rgb(data, path, min_side, limit, pixels)
    if kind == _JPEG:
        return decode_rgb(data, path, min_side, limit)
    item, *shape = _SHAPE.unpack_from(data)
    values = np.frombuffer(data, np.uint8 if item == 1 else np.uint16, offset=_SHAPE.size)
    return values.reshape(shape).copy()
