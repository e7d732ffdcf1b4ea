"""The masks of a data set: those beside its pictures, or those that a manifest names."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from orchestrator import disk
from orchestrator.config.dense import MaskData
from orchestrator.data.sources import manifest
from orchestrator.data.sources.captions import captions_path
from orchestrator.errors import UserError, shortened
from orchestrator.fsio import atomic_write
from orchestrator.storage.cache_folder import cache_folder

_NAMED = 3
# Of the cache.
_MASKS = "masks"
_PNG = b"\x89PNG\r\n\x1a\n"


def manifest_of(data: MaskData) -> Path | None:
    """Where the manifest is; None without one. Raises UserError if there is no such file."""
    if data.manifest is None:
        return None
    table = captions_path(data.manifest, data.path)
    if table is None:
        raise UserError(
            f"the manifest {data.manifest} does not exist",
            where=str(data.path),
            hint="give its path from here or from the folder of the data set",
        )
    return table


def mask_weights(data: MaskData) -> Mapping[str, float]:
    """How often pictures are drawn beside others, where the manifest says it; raises as :func:`manifest_of`."""
    table = manifest_of(data)
    return {} if table is None else manifest.read(table, data.path).said.weights


def mask_pairs(data: MaskData) -> list[tuple[str, str]]:
    """Paths of pictures and their masks from `data.path`, sorted by the pictures'.

    With a manifest, these are the pictures that it gives a mask; the others take no part. Masks that are in a Parquet
    manifest become files in this machine's cache, and their paths are absolute.

    Raises:
        UserError: there are none, a file is missing, or as :func:`orchestrator.config.dense.paired`.
    """
    table = manifest_of(data)
    if table is None:
        return data.pairs()
    found = sorted({**manifest.read(table, data.path).masks, **_unpacked(table, data.path)}.items())
    if not found:
        raise UserError(
            "the manifest gives no picture a mask",
            where=str(table),
            hint="give it a column `mask` with the path of a PNG from the folder of the data set, or in Parquet with "
            "the PNG itself",
        )
    for what, place in (("picture", 0), ("mask", 1)):
        gone = [pair[place] for pair in found if not (data.path / pair[place]).is_file()]
        if gone:
            number = f"1 {what}" if len(gone) == 1 else f"{len(gone):,} {what}s"
            raise UserError(
                f"{number} of the manifest cannot be found, such as {shortened(', '.join(gone[:_NAMED]), 300)}",
                where=str(table),
                hint=f"paths are from {data.path}, with forward slashes",
            )
    wrong = next((mask for _, mask in found if PurePosixPath(mask).suffix.lower() != ".png"), None)
    if wrong is not None:
        raise UserError(
            f"the mask {shortened(wrong, 200)} is not a PNG",
            where=str(table),
            hint="save masks as PNGs in greys or with a palette, whose values are numbers of classes",
        )
    return found


def _unpacked(table: Path, root: Path) -> Mapping[str, str]:
    """The masks that a manifest holds, by picture, as files in the cache that are named by their content.

    A manifest that has not changed since this process unpacked it is not read again: it is asked for several times.

    Raises:
        UserError: a mask is not a PNG, a picture has two, or the cache cannot take them.
    """
    status = table.stat()
    look = status.st_size, status.st_mtime_ns, status.st_ino
    given = table, root, cache_folder() / _MASKS, look
    found = _unpack(*given)
    if not all(map(os.path.isfile, found.values())):
        _unpack.cache_clear()
        found = _unpack(*given)
    return found


@functools.lru_cache(maxsize=4)
def _unpack(table: Path, root: Path, folder: Path, look: tuple[int, ...]) -> Mapping[str, str]:
    """As :func:`_unpacked`; `look` tells one state of the file from another."""
    found: dict[str, str] = {}
    for row, written, mask in manifest.mask_bytes(table):
        picture = manifest.place_of(written, root, table, row)
        if not mask.startswith(_PNG):
            raise UserError(
                f"the mask in row {row} of the manifest is not a PNG",
                where=f"{table}:{row}",
                hint="save masks as PNGs in greys or with a palette, whose values are numbers of classes",
            )
        file = folder / f"{hashlib.sha256(mask).hexdigest()}.png"
        if found.setdefault(picture, str(file)) != str(file):
            raise UserError(
                f"the manifest gives {shortened(picture, 200)} two masks",
                where=f"{table}:{row}",
                hint="give each picture one mask",
            )
        # Named by what they hold, and on the disk before that: one of the right size is there from an earlier run.
        if file.is_file() and file.stat().st_size == len(mask):
            continue
        disk.make_folder(folder, "name another folder in the environment variable ORCHESTRATOR_CACHE")
        atomic_write(file, mask)
    return found
