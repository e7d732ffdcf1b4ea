"""The pictures of a dataset, each hashed, decoded once, and joined with its caption and label."""

from __future__ import annotations

import hashlib
import stat
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from orchestrator.config.schema import DataSource
from orchestrator.data.decode import Pixels, UnreadableImage, use_rgb
from orchestrator.data.sources.digests import FileStamp, stamp_of, trusted
from orchestrator.data.sources.digests import note as note_digests
from orchestrator.data.sources.folder import Listing, list_images, side_by_side
from orchestrator.data.sources.remote import is_remote
from orchestrator.data.sources.shard_members import shard_of
from orchestrator.data.sources.source_captions import captions_of
from orchestrator.fsio import why


@dataclass(frozen=True)
class ScannedImage:
    """One image file of a source, readable or not.

    Attributes:
        source: the source's name in the pipeline file.
        path: relative to the source's folder, posix.
        sha256: of the file's bytes.
        bytes: the file's size.
        width, height: decoded, upright, in pixels; 0 if unreadable.
        caption, label: from the captions file; None where it says nothing.
        error: why the file cannot be decoded, or None.
        error_kind: the kind of that reason, one of `account.KINDS`; empty without one.
        peak: the largest value of a file of 16 bits whose dataset names no range; 0 of others.
        captions: all of them, where there are several; `caption` is the first.
        weight: how often it is drawn beside others.
    """

    source: str
    path: str
    sha256: str
    bytes: int
    width: int
    height: int
    caption: str | None = None
    label: str | None = None
    error: str | None = None
    error_kind: str = ""
    peak: int = 0
    captions: tuple[str, ...] = ()
    weight: float = 1.0


class _KnownError(Exception):
    """What is in a file is known: it need not be decoded."""


class Known(Protocol):
    """What a picture looks like: its file's size, height and width, and the largest value where that is asked for."""

    @property
    def bytes(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def peak(self) -> int: ...


class KnownPictures(Protocol):
    """Remembers what pictures look like by the sha256 of their files, for any number of threads."""

    def load(self, digests: Sequence[str]) -> None:
        """Take up what earlier runs remembered of these files."""

    def find(self, sha256: str) -> Known | None:
        """What is known of a file's content."""

    def note(self, sha256: str, pixels: Pixels, size: int, peak: int) -> None:
        """Remember a decoded picture, the bytes of its file, and the largest value of a file of 16 bits."""

    def save(self) -> None:
        """Keep what was noted for other runs."""


def scan(
    source: DataSource,
    name: str,
    listing: Listing | None = None,
    on_each: Callable[[], object] = lambda: None,
    known: KnownPictures | None = None,
) -> list[ScannedImage]:
    """All image files below the source's folder in order of their paths, each fully decoded or known.

    Args:
        source: the folder.
        name: the source's name, for messages.
        listing: what is in the folder, where it is known; else it is looked up.
        on_each: called after each file, by any thread.
        known: what pictures look like: files that have not changed since it was remembered are not read, and those
            whose content is known under any name are not decoded.

    Raises:
        UserError: no such folder, no images in it, or a captions file that is missing, lacks a `file` column,
            or names files that do not exist.
    """
    listing = listing or list_images(source, name)
    said = captions_of(source, name, listing.files)
    stamps = _stamps(source, listing) if known is not None else {}
    place = f"{source.root}::pictures"
    digests_of: dict[str, str] = {}
    # What `plan` hashed, and what was hashed here.
    for where in (str(source.root), place) if stamps else ():
        digests_of |= trusted(where, list(stamps), list(stamps.values()))
    if known is not None:
        known.load(sorted(set(digests_of.values())))
    fresh: dict[str, tuple[FileStamp, int, str]] = {}

    def scan_one(relative: str) -> ScannedImage:
        digest, stamp = digests_of.get(relative), stamps.get(relative)
        one = known.find(digest) if known is not None and digest is not None else None
        if one is not None and digest is not None:
            found = _known(name, relative, digest, one)
        else:
            began = time.time_ns()
            found = _decoded(source, name, relative, known)
            if stamp is not None and found.error is None:
                fresh[relative] = stamp, began, found.sha256
        on_each()
        caption, label = said.notes.get(relative, (None, None))
        more, weight = said.more.get(relative, ()), said.weights.get(relative, 1.0)
        return replace(found, caption=caption, label=label, captions=more, weight=weight)

    try:
        # The decoders release the interpreter lock.
        return side_by_side(scan_one, listing.files, threading.Event())
    finally:
        if known is not None:
            known.save()
            # What changed while it was read has another stamp by now.
            now = stamps if source.is_remote else _stamps(source, replace(listing, stamps=()), fresh)
            note_digests(place, {file: entry for file, entry in fresh.items() if now.get(file) == entry[0]})


def _decoded(source: DataSource, name: str, relative: str, known: KnownPictures | None) -> ScannedImage:
    """A file read, and decoded unless its content is known."""
    seen = [(hashlib.sha256().hexdigest(), 0)]
    peaks = [0]

    def note(data: bytes) -> None:
        seen.append((hashlib.sha256(data).hexdigest(), len(data)))
        if known is not None and known.find(seen[-1][0]) is not None:
            raise _KnownError

    def measure(image: Pixels) -> tuple[int, int]:
        if known is not None:
            known.note(seen[-1][0], image, seen[-1][1], peaks[-1])
        return image.shape[0], image.shape[1]

    try:
        height, width = use_rgb(
            source.path / relative,
            measure,
            max_pixels=source.max_pixels,
            on_bytes=note,
            pixels=source.pixels,
            on_wide=peaks.append,
        )
    except _KnownError:
        one = known.find(seen[-1][0]) if known is not None else None
        assert one is not None
        return _known(name, relative, seen[-1][0], one)
    except UnreadableImage as problem:
        return ScannedImage(
            name, relative, *seen[-1], 0, 0, None, None, problem.reason, problem.kind, peaks[-1]
        )
    return ScannedImage(name, relative, *seen[-1], width, height, peak=peaks[-1])


def _stamps(source: DataSource, listing: Listing, files: Iterable[str] | None = None) -> dict[str, FileStamp]:
    """Stamps of files, those in shards as their shard; without those of which it is not known."""
    wanted = listing.files if files is None else tuple(files)
    if source.is_remote or listing.stamps:
        return dict(zip(listing.files, listing.stamps, strict=True)) if listing.stamps else {}
    found: dict[str, FileStamp] = {}
    of_shards: dict[str, FileStamp | None] = {}
    for file in wanted:
        holder = shard_of(file)
        if holder not in of_shards:
            try:
                of_shards[holder] = stamp_of((source.path / holder).stat())
            except OSError:
                of_shards[holder] = None
        if (stamp := of_shards[holder]) is not None:
            found[file] = stamp
    return found


def _known(name: str, relative: str, digest: str, one: Known) -> ScannedImage:
    return ScannedImage(name, relative, digest, one.bytes, one.width, one.height, peak=one.peak)


def gone(root: Path, relative: str) -> str | None:
    """Why a file that was there cannot be read now, as far as it is told without reading it; None if it is there."""
    if is_remote(root):
        return None
    try:
        status = (root / shard_of(relative)).stat()
    except OSError as error:
        return why(error)
    return None if stat.S_ISREG(status.st_mode) else "not a file"
