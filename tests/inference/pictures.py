"""The pictures of these tests, and what becomes of each."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 16


def pixels(seed: int, height: int = 40, width: int = 56) -> NDArray[np.uint8]:
    """A smooth random picture: unlike noise it survives JPEG."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


# In the order of their paths.
READABLE = (
    "below/deeper/turned.jpg", "below/plain.png", "clear.png", "large.jpg", "palette.png", "print.jpg", "sixteen.png",
    "tiny.gif",
)  # fmt: skip
UNREADABLE = ("broken.jpg", "empty.png", "huge.png", "text.jpeg")
LEFT_OUT = ("notes.txt", "pipe.jpg")


def huge_claim() -> bytes:
    """A PNG of a hundred bytes that says it has 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )
