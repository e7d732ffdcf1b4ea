"""Shards: pictures in tar files, read in place by (shard, offset, length), or in Parquet files.

A picture in a shard has a path like any other, see :mod:`orchestrator.data.sources.shard_members`. The headers of a
shard are read once and remembered, as digests are.
"""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, cast

from orchestrator.data.sources import account as accounts
from orchestrator.data.sources import parquet_shards
from orchestrator.data.sources.captions import Captions, Note, text_of
from orchestrator.data.sources.digests import FileStamp, forget, is_settled, remembered, stamp_of
from orchestrator.data.sources.remote import HEADER_BYTES, is_remote, open_object
from orchestrator.data.sources.shard_members import member_path
from orchestrator.errors import first_line, shortened
from orchestrator.fsio import open_regular, why

ENDINGS = {"tar": frozenset({".tar"}), "parquet": parquet_shards.ENDINGS}
# Texts beside a picture, by what they say.
_CAPTION, _LABEL, _BOTH = ("txt", "caption"), ("cls", "label"), ("json",)
# A text beside a picture that is larger is not a caption.
_LONGEST_TEXT = 1 << 20
# Names, owners and times of a member; and where a second archive would begin behind the end of the first.
_LONGEST_HEADER = 4 << 20
_LOOKED_AFTER = 64 << 10
_CUT = "the shard is cut off or damaged: what follows is not read"


LeftOutMember = tuple[str, str, str, int]


@dataclass(frozen=True)
class TarShard:
    """The pictures of one shard.

    Attributes:
        pictures: member, offset, length, caption and label of each, in the shard's order.
        left_out: member, reason and kind of the reason of everything else but captions and labels, and the number of
            pictures that it stands for. Without a member it is said of the shard.
    """

    pictures: tuple[tuple[str, int, int, str | None, str | None], ...] = ()
    left_out: tuple[LeftOutMember, ...] = ()

    @property
    def total(self) -> int:
        """Pictures, with those that are known to be there and cannot be read."""
        hidden = sum(
            count for member, _, kind, count in self.left_out if not member and kind == accounts.SHARD
        )
        return len(self.pictures) + hidden

    def text(self) -> str:
        """As JSON."""
        return json.dumps([self.pictures, self.left_out])

    @classmethod
    def of(cls, text: str) -> TarShard:
        """From JSON; raises ValueError."""
        pictures, left_out = json.loads(text)
        # Earlier versions did not write how many pictures one stands for.
        left_out = [(*row, 1) if len(row) == 3 else tuple(row) for row in left_out]
        return cls(tuple(map(tuple, pictures)), tuple(left_out))


@dataclass(frozen=True)
class Contents:
    """What is in several shards.

    Attributes:
        files: paths of pictures, sorted.
        left_out: path, reason, kind of the reason and number of pictures of the rest.
        said: captions and labels.
    """

    files: tuple[str, ...]
    left_out: tuple[LeftOutMember, ...]
    said: Captions = field(repr=False)


def contents(
    root: Path, shards: Sequence[str], endings: Iterable[str], stamps: Mapping[str, FileStamp] | None = None
) -> Contents:
    """The pictures in shards; headers of shards that have not changed are not read again.

    Args:
        root: the dataset's folder.
        shards: paths of the tar or Parquet files from it.
        endings: of files that are taken for pictures.
        stamps: the stamp of each shard, where that is known; else it is asked.
    """
    top = root if is_remote(root) else root.resolve()
    known = _load([str(top / shard) for shard in shards])
    files: list[str] = []
    left_out: list[LeftOutMember] = []
    unreadable: dict[str, tuple[str, int | None]] = {}
    read_bytes = 0
    notes: dict[str, Note] = {}
    fresh: dict[str, tuple[FileStamp, int, TarShard]] = {}
    wanted = frozenset(endings)
    for shard in shards:
        place = str(top / shard)
        try:
            stamp = stamp_of((root / shard).stat()) if stamps is None else stamps[shard]
            # Of objects the ETag tells a change, however short after the last one.
            settled = stamps is not None or is_settled(stamp, known[place][1] if place in known else 0)
            if settled and place in known and known[place][0] == stamp:
                found = known[place][2]
            else:
                began = time.time_ns()
                found = _read(root / shard, stamp.size, wanted)
                found = _with_hidden(found, known[place][2].total if place in known else 0)
                if stamp.fits:
                    fresh[place] = stamp, began, found
        except parquet_shards.NoPicturesError as error:
            reason = f"no shard that can be read: {shortened(first_line(error), 200)}"
            left_out.append((shard, reason, accounts.NOT_A_PICTURE, 1))
            continue
        except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
            reason = why(error) if isinstance(error, OSError) else shortened(first_line(error), 200)
            before = known[place][2].total if place in known else None
            foot = error.pictures if isinstance(error, parquet_shards.DamagedRowsError) else None
            unreadable[shard] = reason, foot or before
            continue
        read_bytes += stamp.size
        for member, offset, length, caption, label in found.pictures:
            path = member_path(shard, offset, length, member)
            files.append(path)
            if caption is not None or label is not None:
                notes[path] = caption, label
        left_out += [
            (f"{shard}/{member}" if member else shard, reason, kind, count)
            for member, reason, kind, count in found.left_out
        ]
    _save(fresh)
    each = len(files) / read_bytes if read_bytes else 0.0
    left_out += [
        _unreadable(root, shard, reason, hidden, each, stamps)
        for shard, (reason, hidden) in unreadable.items()
    ]
    return Contents(tuple(sorted(files)), tuple(left_out), Captions(notes))


def _unreadable(
    root: Path,
    shard: str,
    reason: str,
    hidden: int | None,
    pictures_per_byte: float,
    stamps: Mapping[str, FileStamp] | None,
) -> LeftOutMember:
    """An account of a shard: with the number of pictures it hides, or with what its size makes likely."""
    what = f"no shard that can be read: {reason}"
    if hidden:
        return shard, f"{what}; it has {hidden:,} pictures", accounts.SHARD, hidden
    try:
        size = stamps[shard].size if stamps is not None else (root / shard).stat().st_size
    except OSError:
        size = 0
    likely = round(pictures_per_byte * size)
    if likely < 1:
        return shard, f"{what}; how many pictures it has is not known", accounts.SHARD, 1
    return shard, f"{what}; by its size it has about {likely:,} pictures", accounts.SHARD, likely


def _with_hidden(shard: TarShard, before: int) -> TarShard:
    """A shard of which a part cannot be read, with the number of pictures in that where an earlier run had them."""
    hidden = before - len(shard.pictures)
    if hidden < 1:
        return shard
    left_out = tuple(
        (member, f"{reason}; it had {hidden:,} more pictures", kind, hidden)
        if not member and kind == accounts.SHARD
        else (member, reason, kind, count)
        for member, reason, kind, count in shard.left_out
    )
    return TarShard(shard.pictures, left_out)


# --- headers --------------------------------------------------------------------------------------------------------


def _read(path: Path, size: int, endings: frozenset[str]) -> TarShard:
    """The headers of a shard, and the texts beside its pictures; no picture is read."""
    pictures: list[tuple[str, int, int, str]] = []
    texts: dict[str, dict[str, str]] = {}
    left_out: list[LeftOutMember] = []
    if path.suffix.lower() in parquet_shards.ENDINGS:
        return TarShard(tuple(parquet_shards.rows(path)))
    # Only without compression are pictures where an offset says.
    with _opened(path) as opened:
        file = _Headers(opened)
        with tarfile.open(fileobj=cast(IO[bytes], file), mode="r:") as tar:
            for member in _members(tar, size):
                name = PurePosixPath(member.name)
                key, _, ending = name.name.partition(".")
                sample = str(name.with_name(key)) if key else str(name)
                if member.isdir():
                    continue
                if reason := _reason(member, size):
                    left_out.append((member.name, *reason, 1))
                elif f".{ending.rpartition('.')[2].lower()}" in endings:
                    pictures.append((member.name, member.offset_data, member.size, sample))
                elif ending.lower() in (*_CAPTION, *_LABEL, *_BOTH) and member.size <= _LONGEST_TEXT:
                    content = tar.extractfile(member)
                    assert content is not None
                    texts.setdefault(sample, {})[ending.lower()] = content.read().decode("utf-8", "replace")
                else:
                    left_out.append((member.name, *_of_no_picture(ending), 1))
            if reason := _after(file, tar.offset, size):
                left_out.append(("", *reason, 1))
    rows = [
        (member, offset, length, *_note_of(texts.get(sample, {})))
        for member, offset, length, sample in pictures
    ]
    return TarShard(tuple(rows), tuple(left_out))


class _Headers:
    """A shard as a file whose headers are read: what a header says of its own length is not believed."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise ValueError(f"a header says that it has {size:,} bytes")
        return self._file.read(size)


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """The members up to the end, or to where the shard is cut off or leads back."""
    member = None
    try:
        for member in tar:
            yield member
            if member.size < 0 or tar.offset > size:
                return
    except tarfile.ReadError:
        # Of a shard that is none at all.
        if member is None:
            raise


def _after(file: _Headers, offset: int, size: int) -> tuple[str, str] | None:
    """What is wrong with what follows the last member, and the kind of that: it should be zeros."""
    if not 0 <= offset < size:
        return _CUT, accounts.SHARD
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        return _CUT, accounts.SHARD
    if any(file.read(_LOOKED_AFTER)):
        return "something follows the end of the shard, and is not read", accounts.SHARD
    return None


def _of_no_picture(ending: str) -> tuple[str, str]:
    written = f".{ending.rpartition('.')[2]}" if ending else ""
    kind = accounts.OTHER_DATA if written.lower() in accounts.BESIDE_PICTURES else accounts.ENDING
    return accounts.ENDS_IN + written if written else accounts.NO_ENDING, kind


def _opened(path: Path) -> io.BufferedReader:
    return open_object(path, block=HEADER_BYTES)[0] if is_remote(path) else open_regular(path)


def _reason(member: tarfile.TarInfo, size: int) -> tuple[str, str] | None:
    """Why a member is not looked at, and the kind of that."""
    if not member.isreg():
        return "a link or a device in a shard", accounts.NOT_A_PICTURE
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return "its name leads out of the shard", accounts.ACCESS
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8", accounts.ACCESS
    if PurePosixPath(member.name).name.startswith("."):
        return "hidden", accounts.HIDDEN
    if member.size < 0 or member.offset_data + member.size > size:
        return "the shard ends before it", accounts.DAMAGED
    if member.issparse():
        return "a sparse file in a shard", accounts.NOT_A_PICTURE
    return None


def _note_of(texts: dict[str, str]) -> Note:
    """Caption and label by the texts beside a picture: of its own files, or else of its JSON."""
    try:
        told = json.loads(texts.get("json", "{}"))
    except (ValueError, RecursionError):
        told = {}
    told = told if isinstance(told, dict) else {}

    def one(own: Sequence[str], *keys: str) -> str | None:
        found = [texts[name] for name in own if name in texts]
        found += [text for key in keys if (text := text_of(told.get(key)))]
        return next((text.strip() for text in found if text.strip()), None)

    return one(_CAPTION, "caption", "text"), one(_LABEL, "label", "cls", "class")


def _load(places: Sequence[str]) -> dict[str, tuple[FileStamp, int, TarShard]]:
    found = {}
    try:
        with remembered() as connection:
            for place in places:
                row = connection.execute(
                    "SELECT size, mtime, ctime, listed, members FROM shards WHERE path = ?", (place,)
                ).fetchone()
                if row is not None:
                    found[place] = FileStamp(*row[:3]), row[3], TarShard.of(row[4])
    except (sqlite3.Error, OSError, ValueError, TypeError) as error:
        forget(error)
    return found


def _save(fresh: dict[str, tuple[FileStamp, int, TarShard]]) -> None:
    if not fresh:
        return
    rows = [(place, *stamp, began, shard.text()) for place, (stamp, began, shard) in fresh.items()]
    try:
        with remembered() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO shards VALUES (?, ?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
    except (sqlite3.Error, OSError) as error:
        forget(error)
