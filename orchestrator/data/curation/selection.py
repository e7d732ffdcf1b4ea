"""From a heap of image files to a training mix: what is whole, what is new, what to take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.pixels import PixelFormat
from orchestrator.config.schema import MAX_PIXELS
from orchestrator.data.curation.components import CHOSEN, HELD_OUT, LEFT_OUT, RETRIEVED
from orchestrator.data.curation.dedup import NearLimit, drop_near_duplicates
from orchestrator.data.curation.signatures import ImageSignature, SignatureCache, signature_of
from orchestrator.data.decode import UnreadableImage, use_rgb
from orchestrator.data.index import ImageRecord
from orchestrator.data.rng import derive
from orchestrator.data.sources import account as accounts
from orchestrator.data.sources.folder import LeftOut
from orchestrator.data.sources.scan import ScannedImage, gone

NEARLY = "nearly the same pixels"


@dataclass(frozen=True)
class ImageStatus:
    """What became of one file.

    Attributes:
        photo: the file.
        root: absolute folder of its source.
        status: "unique", "duplicate", "corrupt", or "left out" for what is not taken for a picture.
        reason: why, in words.
        duplicate_of: "source/path" of the file that stands for it.
        pictures: how many it stands for: 1 but for an unreadable shard.
    """

    photo: ScannedImage
    root: str
    status: str
    reason: str = ""
    duplicate_of: str | None = None
    pictures: int = 1

    @property
    def name(self) -> str:
        return f"{self.photo.source}/{self.photo.path}"

    @property
    def kind(self) -> str:
        """The kind of its reason, one of `account.KINDS`; `account.TAKEN` of a picture that is kept."""
        if self.status == "duplicate":
            return accounts.NEAR_DUPLICATE if self.reason.startswith(NEARLY) else accounts.DUPLICATE
        if self.status == "unique":
            return accounts.TAKEN
        return self.photo.error_kind or accounts.DAMAGED


def filter_images(
    photos: Sequence[ScannedImage],
    roots: Mapping[str, Path],
    near_rms: float,
    near_relative: float | None,
    stop: Callable[[], None],
    max_pixels: Mapping[str, int] | None = None,
    pixels: Mapping[str, PixelFormat | None] | None = None,
    on_limits: Callable[[Sequence[NearLimit]], None] = lambda limits: None,
    known: Mapping[str, SignatureCache] | None = None,
    on_moments: Callable[[Sequence[NDArray[np.float64]]], None] = lambda moments: None,
) -> tuple[list[ImageStatus], NDArray[np.float32]]:
    """Decides which files are corrupt, which repeat an earlier one, and which are kept.

    A duplicate has the same bytes, the same decoded pixels, or (near duplicate) a 32×32 thumbnail within
    `near_rms` grey levels of an earlier kept picture of the same aspect ratio. The first in the given order
    is kept.

    Args:
        photos: scanned files of all sources, in order of preference.
        roots: absolute folder of each source.
        near_rms: root mean square difference in grey levels; 0 finds equal thumbnails only.
        near_relative: the same as a share of what is usual in the source; the smaller one counts. None: `near_rms`.
        stop: called often; raises to stop.
        max_pixels: the largest width × height of each source; default: `MAX_PIXELS`.
        pixels: how the values of each source's files are seen.
        on_limits: is told what near duplicates are in each source, and how many there are.
        known: of each source, what its pictures look like, as far as that is known; others are decoded.
        on_moments: is told the `bands.moments` of the unique pictures whose mean and deviation are to be measured.

    Returns:
        What became of each file, in the order of `photos`, and the descriptors (N, 336) of the unique ones.
    """
    statuses = [ImageStatus(photo, str(roots[photo.source]), "unique") for photo in photos]
    statuses = [
        replace(status, status="corrupt", reason=status.photo.error) if status.photo.error else status
        for status in statuses
    ]
    _drop_repeats(statuses, {i: status.photo.sha256 for i, status in enumerate(statuses)}, "the same bytes")
    signatures = _signatures(statuses, max_pixels or {}, stop, pixels or {}, known or {})
    _drop_repeats(
        statuses, {i: signature_of.pixels for i, signature_of in signatures.items()}, "the same pixels"
    )
    rows = _unique(statuses)
    thumbnails = np.array([signatures[i].thumbnail for i in rows], dtype=np.uint8)
    aspects = np.array([statuses[i].photo.width / statuses[i].photo.height for i in rows])
    names = [(statuses[i].photo.source, statuses[i].photo.path) for i in rows]
    kept_as, limits = drop_near_duplicates(thumbnails, aspects, names, near_rms, near_relative)
    on_limits(limits)
    for row, other in kept_as.items():
        statuses[rows[row]] = _repeat(statuses[rows[row]], statuses[rows[other]], NEARLY)
    rows = _unique(statuses)
    on_moments([found for i in rows if (found := signatures[i].moments) is not None])
    return statuses, np.array([signatures[i].descriptor for i in rows], dtype=np.float32)


def left_out(source: str, item: LeftOut, root: Path) -> ImageStatus:
    """What became of a file that is not taken for a picture."""
    photo = ScannedImage(source, item.path, "", 0, 0, 0, error_kind=item.kind)
    return ImageStatus(photo, str(root), "left out", item.reason, pictures=item.pictures)


def _unique(statuses: Sequence[ImageStatus]) -> list[int]:
    return [i for i, status in enumerate(statuses) if status.status == "unique"]


def _repeat(status: ImageStatus, original: ImageStatus, reason: str) -> ImageStatus:
    return replace(
        status, status="duplicate", reason=f"{reason} as {original.name}", duplicate_of=original.name
    )


def _drop_repeats(statuses: list[ImageStatus], contents: Mapping[int, str], reason: str) -> None:
    first: dict[str, int] = {}
    for i in _unique(statuses):
        original = first.setdefault(contents[i], i)
        if original != i:
            statuses[i] = _repeat(statuses[i], statuses[original], reason)


def _signatures(
    statuses: list[ImageStatus],
    max_pixels: Mapping[str, int],
    stop: Callable[[], None],
    formats: Mapping[str, PixelFormat | None],
    known: Mapping[str, SignatureCache],
) -> dict[int, ImageSignature]:
    """What the unique pictures look like; one whose file went or changed since it was scanned becomes corrupt."""

    def signature_or_reason(i: int) -> ImageSignature | str:
        stop()
        photo = statuses[i].photo
        limit = max_pixels.get(photo.source, MAX_PIXELS)
        cache = known.get(photo.source)
        found = cache.find(photo.sha256) if cache is not None else None
        if found is not None:
            return gone(Path(statuses[i].root), photo.path) or found
        try:
            path, how = Path(statuses[i].root) / photo.path, formats.get(photo.source)
            return use_rgb(path, lambda seen: signature_of(seen, how), max_pixels=limit, pixels=how)
        except UnreadableImage as error:
            return error.reason

    rows = _unique(statuses)
    signatures: dict[int, ImageSignature] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, found in zip(rows, pool.map(signature_or_reason, rows), strict=True):
            if isinstance(found, ImageSignature):
                signatures[i] = found
            else:
                statuses[i] = replace(statuses[i], status="corrupt", reason=found)
    return signatures


def is_held_out(sha256: str, share: float) -> bool:
    """Whether a picture is one of this share: by its bytes alone, whatever else there is. A larger share has it too."""
    return derive("holdout", sha256) / 2**64 < share


def index_rows(
    statuses: Sequence[ImageStatus],
    clusters_N: NDArray[np.int64],
    balanced_N: NDArray[np.bool_],
    holdout: float = 0.0,
    retrieved_N: NDArray[np.bool_] | None = None,
) -> list[ImageRecord]:
    """The rows of the training index: unique pictures, component "balanced", "retrieved", "pool", or "held_out".

    A share `holdout` of them is held out, whatever else they are.
    """
    retrieved_N = np.zeros(len(clusters_N), np.bool_) if retrieved_N is None else retrieved_N
    kept = [status for status in statuses if status.status == "unique"]
    return [
        ImageRecord(
            source=status.photo.source,
            path=status.photo.path,
            root=status.root,
            sha256=status.photo.sha256,
            width=status.photo.width,
            height=status.photo.height,
            caption=status.photo.caption,
            label=status.photo.label,
            captions=status.photo.captions,
            weight=status.photo.weight,
            component=HELD_OUT
            if is_held_out(status.photo.sha256, holdout)
            else CHOSEN
            if balanced
            else RETRIEVED
            if retrieved
            else LEFT_OUT,
            retrieved=bool(retrieved) and not is_held_out(status.photo.sha256, holdout),
            cluster=int(number),
        )
        for status, number, balanced, retrieved in zip(kept, clusters_N, balanced_N, retrieved_N, strict=True)
    ]
