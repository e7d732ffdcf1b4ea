"""What can be found out about a folder of pictures without being told: count, sizes, captions, labels, oddities.

All files are listed, by the walk that `plan` and `curate` use, so that counts agree. Of a few hundred of them the
header is read. Only a few of those with more than 8 bits are decoded, to see which of their values they use.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from orchestrator.config.schema import DataSource
from orchestrator.data.decode import UnreadableImage, read_header, use_rgb
from orchestrator.data.sources import captions
from orchestrator.data.sources.captions import Captions
from orchestrator.data.sources.folder import Listing, list_images, shown
from orchestrator.data.sources.pixel_checks import likely_white
from orchestrator.errors import UserError

# Pictures whose header is read, evenly spread over the sorted names.
_LOOKED_AT = 200
_TABLES = (".csv", ".tsv")
# Tables of this name are looked at first, and no more than so many tables at all.
_LIKELY = ("captions", "metadata", "labels")
_MOST_TABLES = 5
# Folders that say which part of a dataset a picture belongs to, and not what it shows.
_PARTS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "images", "image", "img", "imgs"}
    | {"photos", "pictures", "data", "raw", "all", "unlabeled", "unlabelled", "unsorted"}
)
# Years, dates, and the folders that cameras make (DCF: 100CANON).
_DATED = re.compile(r"(19|20)\d\d([-_. ]?\d\d){0,2}|\d{3}[A-Z_]{5}")
# Of the pictures, that lie in a folder which names what they show.
_LABELLED = 0.9
_DEEP_BITS = 8
# Pictures with more bits that are decoded.
_DECODED = 20


@dataclass(frozen=True)
class Survey:
    """What is known of a folder of pictures.

    Attributes:
        source: the folder, and its table of captions or labels if there is one.
        listing: every file, taken or left out.
        captions: what that table says; empty without one.
        folder_labels: a label by file, where the names of sub-folders look like ones; else empty.
        sides: the shorter side of each picture that was looked at, in pixels, ascending.
        unreadable: of the pictures that were looked at, those whose header cannot be read, with the reason.
        deep: of the pictures that were looked at, how many have more than 8 bits a channel.
        white: the value that is probably white in files of 16 bits that use a small part of them, or None.
        table_error: why the table that is there is not used, or None.
    """

    source: DataSource
    listing: Listing
    captions: Captions
    folder_labels: Mapping[str, str]
    sides: tuple[int, ...]
    unreadable: tuple[tuple[str, str], ...]
    deep: int
    white: int | None = None
    table_error: UserError | None = None

    @property
    def num_pictures(self) -> int:
        """Files that are taken for pictures."""
        return len(self.listing.files)

    @property
    def num_looked_at(self) -> int:
        """Files whose header was read, or could not be."""
        return len(self.sides) + len(self.unreadable)

    @property
    def side(self) -> int:
        """The shorter side that half of the pictures have, or more."""
        return self.sides[len(self.sides) // 2]

    @property
    def labels(self) -> Mapping[str, str]:
        """A label by file: of the table, or else of the folders."""
        of_table = {file: label for file, (_, label) in self.captions.notes.items() if label}
        return of_table or self.folder_labels

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many files are left out, by reason, the most frequent first."""
        return dict(Counter(item.reason for item in self.listing.left_out).most_common())


def survey(folder: Path) -> Survey:
    """Look at a folder of pictures.

    Raises:
        UserError: no such folder, no pictures in it, or none that can be read.
    """
    source = DataSource(path=folder)
    try:
        listing = list_images(source, "pictures")
    except UserError as error:
        raise UserError(error.what.replace(" of dataset 'pictures'", ""), hint=error.hint) from None
    table, said, table_error = _table(folder, listing.files)
    if table is not None:
        source = source.model_copy(update={"captions": table})
        # The table is no longer among what is left out.
        listing = list_images(source, "pictures")
    found = Survey(source, listing, said, folder_labels(listing.files), (), (), 0, table_error=table_error)
    return _looked_at(found)


def _looked_at(found: Survey) -> Survey:
    files = found.listing.files
    count = min(_LOOKED_AT, len(files))
    sides, unreadable, deep = [], [], 0
    peaks: list[int] = []
    for file in (files[number * len(files) // count] for number in range(count)):
        try:
            header = read_header(found.source.path / file, found.source.max_pixels)
        except UnreadableImage as error:
            unreadable.append((shown(file), error.reason))
            continue
        sides.append(min(header.width, header.height))
        if header.bits > _DEEP_BITS:
            deep += 1
            if deep <= _DECODED:
                peaks += _peak(found.source.path / file, found.source.max_pixels)
    if not sides:
        file, reason = unreadable[0]
        raise UserError(
            f"none of the {count} pictures that were looked at in {found.source.path} can be read; {file}: {reason}",
            hint="check that the files were copied whole",
        )
    return replace(
        found, sides=tuple(sorted(sides)), unreadable=tuple(unreadable), deep=deep, white=likely_white(peaks)
    )


def _peak(path: Path, max_pixels: int) -> list[int]:
    """The largest value of a file of 16 bits; nothing of one that cannot be decoded."""
    peaks: list[int] = []
    with contextlib.suppress(UnreadableImage):
        use_rgb(path, lambda image: None, max_pixels=max_pixels, on_wide=peaks.append)
    return peaks


def _table(folder: Path, files: Sequence[str]) -> tuple[Path | None, Captions, UserError | None]:
    """The first table in the folder that speaks of its pictures; or why the likeliest one does not."""
    tables = [path for path in folder.iterdir() if path.suffix.lower() in _TABLES and path.is_file()]
    tables.sort(key=lambda path: (path.stem.lower() not in _LIKELY, path.name))
    first: UserError | None = None
    for path in tables[:_MOST_TABLES]:
        try:
            said = captions.read(path, folder, files)
        except UserError as error:
            first = first or error
            continue
        if said.num_captions or said.num_labels:
            return path, said, None
    return None, Captions({}), first


def folder_labels(files: Sequence[str]) -> dict[str, str]:
    """A label for each file from the folders that it lies in, if their names look like labels; else nothing.

    It is the first folder that not all files share and that is not part of a dataset, such as `train`. Names look like
    labels if nearly all files have one, if there are several with several files on average, and if they are not dates.

    Args:
        files: relative posix paths.
    """
    folders = {file: PurePosixPath(file).parent.parts for file in files}
    kept = {
        file: [name for name in names if name.casefold() not in _PARTS] for file, names in folders.items()
    }
    # Levels at which all files lie in the same folder.
    shared, deepest = 0, max(map(len, kept.values()), default=0)
    while shared < deepest and len({tuple(names[: shared + 1]) for names in kept.values()}) == 1:
        shared += 1
    found = {file: names[shared] for file, names in kept.items() if len(names) > shared}
    dated = sum(any(_DATED.fullmatch(name) for name in names) for names in folders.values())
    several = 2 <= len(set(found.values())) <= len(found) / 2
    if len(found) < _LABELLED * len(files) or not several or dated > len(files) / 2:
        return {}
    return found
