"""Formats of image files: which can be read here, how they begin, and how large they may be."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path

from PIL import features

from orchestrator.data.sources.account import DAMAGED, NOT_A_PICTURE

# Pillow's name of each format that is decoded, and how its files begin.
FORMATS = {
    "JPEG": re.compile(rb"\xff\xd8"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "JPEG2000": re.compile(rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    "AVIF": re.compile(rb"....ftyp(?:avi[fs]|(?:mif1|msf1).{0,32}avi[fs])", re.DOTALL),
    # By the package pillow-heif.
    "HEIF": re.compile(rb"....ftyp(?:he[iv][cxms]|(?:mif1|msf1).{0,32}he[iv][cxms])", re.DOTALL),
}


# Endings of the formats that Pillow always decodes, and those that its build, or another package, may decode.
_ENDINGS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_ENDINGS_OF = {
    "JPEG2000": frozenset({".jp2", ".j2k", ".jpx", ".jpf"}),
    "AVIF": frozenset({".avif"}),
    "HEIF": frozenset({".heic", ".heif"}),
}


# What a file may hold besides four bytes a pixel: metadata, thumbnails.
_EXTRA_BYTES = 64 << 20


class UnreadableImage(Exception):  # noqa: N818 (it names a state of a file)
    """A file that is not an image, or not a whole one. `kind` is one of `account.KINDS`."""

    def __init__(self, path: Path | str, reason: str, kind: str = DAMAGED) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.reason, self.kind)


@functools.cache
def readable_formats() -> frozenset[str]:
    """Those of :data:`FORMATS` that can be decoded here: some by Pillow's build, HEIF by the package pillow-heif."""
    lacking = set()
    if not features.check("jpg_2000"):
        lacking.add("JPEG2000")
    if not features.check("avif"):
        lacking.add("AVIF")
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        lacking.add("HEIF")
    return frozenset(FORMATS) - lacking


@functools.cache
def readable_endings() -> frozenset[str]:
    """The endings, in lower case and with their dot, of files that are taken for pictures here."""
    return _ENDINGS.union(*(_ENDINGS_OF[name] for name in _ENDINGS_OF if name in readable_formats()))


def most_bytes(max_pixels: int) -> int:
    """How many bytes the file of a picture of so many pixels can have."""
    return 4 * max_pixels + _EXTRA_BYTES


def too_many_bytes(size: int, max_pixels: int) -> str | None:
    """Why a file of `size` bytes is not read; None if it may be."""
    return (
        f"{size:,} bytes are more than {max_pixels:,} pixels take" if size > most_bytes(max_pixels) else None
    )


def format_of(data: bytes, path: Path | str) -> str:
    """The format that the file begins as."""
    if not data:
        raise UnreadableImage(path, "the file is empty")
    for name, begins in FORMATS.items():
        if begins.match(data):
            if name not in readable_formats():
                how = (
                    "install pillow-heif" if name == "HEIF" else "this build of Pillow has no decoder for it"
                )
                raise UnreadableImage(path, f"{name} cannot be read here: {how}", NOT_A_PICTURE)
            return name
    known = ", ".join(name for name in FORMATS if name in readable_formats())
    raise UnreadableImage(path, f"not an image of a known format ({known})", NOT_A_PICTURE)


def too_large(width: int, height: int, max_pixels: int) -> str:
    """Why a picture of this size is not decoded."""
    return f"{width:,} × {height:,} pixels are more than the limit of {max_pixels:,}"


def webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of the canvas (RFC 9649, sections 2.5 to 2.7); (0, 0) where it is not to be found."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and len(data) >= 30:
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0
