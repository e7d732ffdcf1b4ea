"""TIFF files of any number of bands, written for tests by the specification (TIFF 6.0) with zlib alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FORMATS = {"u": 1, "i": 2, "f": 3}


def write_tiff(
    path: Path,
    values_HWC: NDArray[Any],
    *,
    order: str = "<",
    deflate: bool = False,
    predictor: bool = False,
    apart: bool = False,
    rows: int | None = None,
) -> Path:
    """Write a picture of C bands in strips.

    Args:
        path: the file.
        values_HWC: whole numbers or fractions.
        order: of bytes.
        deflate: whether strips are compressed.
        predictor: whether differences of neighbours are stored.
        apart: whether each band has strips of its own.
        rows: of a strip; default: all.
    """
    height, width, bands = values_HWC.shape
    rows = rows or height
    planes = values_HWC.transpose(2, 0, 1)[..., None] if apart else values_HWC[None]
    stored = values_HWC.dtype.newbyteorder(order)
    strips = []
    for plane_HWC in planes:
        for top in range(0, height, rows):
            part = plane_HWC[top : top + rows]
            if predictor:
                part = np.concatenate([part[:, :1], part[:, 1:] - part[:, :-1]], axis=1)
            data = np.ascontiguousarray(part).astype(stored).tobytes()
            strips.append(zlib.compress(data) if deflate else data)
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("L", [width]),
        257: ("L", [height]),
        258: ("H", [8 * values_HWC.itemsize] * bands),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [1]),
        273: ("L", [0] * len(strips)),
        277: ("H", [bands]),
        278: ("L", [rows]),
        279: ("L", [len(strip) for strip in strips]),
        284: ("H", [2 if apart else 1]),
        317: ("H", [2 if predictor else 1]),
        338: ("H", [0] * (bands - 1)),
        339: ("H", [_FORMATS[values_HWC.dtype.kind]] * bands),
    }
    extra = 8 + 2 + 12 * len(tags) + 4
    first = extra + sum(len(numbers) * struct.calcsize(f"<{kind}") for kind, numbers in tags.values())
    starts = np.cumsum([first, *(len(strip) for strip in strips[:-1])])
    tags[273] = ("L", [int(start) for start in starts])
    entries, behind = b"", b""
    for tag, (kind, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        where = packed.ljust(4, b"\0")
        if len(packed) > 4:
            where = struct.pack(f"{order}L", extra + len(behind))
            behind += packed
        entries += struct.pack(f"{order}HHL", tag, 3 if kind == "H" else 4, len(numbers)) + where
    behind = behind.ljust(first - extra, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HLH", 42, 8, len(tags))
    path.write_bytes(head + entries + b"\0\0\0\0" + behind + b"".join(strips))
    return path


def band_scene(seed: int, bands: int = 6, side: int = 48, white: int = 4095) -> NDArray[np.uint16]:
    """A made picture (side, side, bands): a few soft blobs, of other brightness in each band."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    values = np.full((side, side, bands), 0.2) + 0.05 * rng.random((side, side, bands))
    for _ in range(4):
        top, left, wide = rng.random(), rng.random(), rng.uniform(0.05, 0.25)
        blob = np.exp(-((y - top) ** 2 + (x - left) ** 2) / (2 * wide**2))
        values += blob[..., None] * rng.uniform(-0.2, 0.6, bands)
    return np.rint(values.clip(0, 1) * white).astype(np.uint16)
