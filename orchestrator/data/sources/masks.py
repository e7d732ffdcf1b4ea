"""The masks of a data set: those beside its pictures, or those that a manifest names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from orchestrator.config.dense import MaskData
from orchestrator.data.sources import manifest
from orchestrator.data.sources.captions import captions_path
from orchestrator.errors import UserError, shortened

_NAMED = 3


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
    """Paths of pictures and their masks below `data.path`, sorted by the pictures'.

    With a manifest, these are the pictures that it gives a mask; the others take no part.

    Raises:
        UserError: there are none, a file is missing, or as :func:`orchestrator.config.dense.paired`.
    """
    table = manifest_of(data)
    if table is None:
        return data.pairs()
    found = sorted(manifest.read(table, data.path).masks.items())
    if not found:
        raise UserError(
            "the manifest gives no picture a mask",
            where=str(table),
            hint="give it a column `mask` with the path of a PNG from the folder of the data set",
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
            f"the mask {shortened(wrong, 200)} is no PNG",
            where=str(table),
            hint="save masks as PNGs in greys or with a palette, whose values are numbers of classes",
        )
    return found
