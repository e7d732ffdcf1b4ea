"""The first step of a curation: every file of the datasets is read once, and counted as a photo or as left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.data.curation.signatures import SignatureCache
from orchestrator.data.sources import account as accounts
from orchestrator.data.sources.folder import LeftOut, list_images
from orchestrator.data.sources.pixel_checks import unclear_range
from orchestrator.data.sources.scan import ScannedImage, scan
from orchestrator.errors import UserError, nearest
from orchestrator.progress import Meter
from orchestrator.stages.base import Context


class Scanned(NamedTuple):
    """What the datasets hold.

    Attributes:
        photos: of all datasets, in the order of their names in the config; those that cannot be read have an error.
        left_out: every other file, with its dataset.
        known: what the photos of each dataset look like, as far as that is known without decoding them.
    """

    photos: list[ScannedImage]
    left_out: list[tuple[str, LeftOut]]
    known: dict[str, SignatureCache]


def scan_sources(context: Context, names: Sequence[str]) -> Scanned:
    """Read the files of the datasets.

    Raises:
        UserError: there is no such dataset, none of its photos can be read, more is left out than a dataset allows, or
            the range of its values is unclear.
    """
    listings = {}
    for name in names:
        if name not in context.sources:
            near = nearest(name, context.sources)
            raise UserError(
                f"there is no dataset {name!r}",
                where=f"stages.{context.name}.data",
                hint=f"did you mean {near!r}?" if near else f"name one of {sorted(context.sources)}",
            )
        listings[name] = list_images(context.sources[name], name)
    read = Meter(context.name, sum(len(listing.files) for listing in listings.values()), "photos read")
    found = Scanned([], [], {})
    for name, listing in listings.items():
        source = context.sources[name]
        found.known[name] = SignatureCache(source.max_pixels, source.pixels)
        found.photos.extend(scan(source, name, listing, read.add, found.known[name]))
        found.left_out.extend((name, item) for item in listing.left_out)
    _check(context, names, found)
    return found


def _check(context: Context, names: Sequence[str], found: Scanned) -> None:
    """Raises UserError as of :func:`scan_sources`, once all files have been read."""
    for name in names:
        _ask_if_many(context, name, found)
    for name in names:
        if error := unclear_range(name, [photo.peak for photo in found.photos if photo.source == name]):
            raise error
    if all(photo.error for photo in found.photos):
        first = found.photos[0]
        raise UserError(
            f"none of the {len(found.photos)} images can be read; {first.path}: {first.error}",
            where=str(context.sources[first.source].path),
            hint="check that the files were copied whole",
        )


def _ask_if_many(context: Context, name: str, found: Scanned) -> None:
    """Raises UserError, with the question whether that is meant, if more of a dataset is lost than it allows."""
    photos = [photo for photo in found.photos if photo.source == name]
    files = [(photo.path, photo.error_kind or accounts.TAKEN, photo.error or "", 1) for photo in photos]
    files += [
        (item.path, item.kind, item.reason, item.pictures)
        for source, item in found.left_out
        if source == name
    ]
    # That none can be read has a message of its own.
    one, limit = accounts.account(name, files), context.sources[name].max_left_out
    if one.taken and (error := accounts.lost_too_many(one, limit, f"data.{name}.max_left_out")):
        raise error
