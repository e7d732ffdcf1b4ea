"""What is in a folder of images: every file decoded once, hashed, and joined with its caption and label."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from orchestrator.config.schema import MAX_PIXELS, DataSource
from orchestrator.data.image_formats import most_bytes, readable_endings, too_many_bytes
from orchestrator.data.sources import account as accounts
from orchestrator.data.sources import manifest, remote, shards
from orchestrator.data.sources.account import Account
from orchestrator.data.sources.captions import (
    MOST_BYTES,
    is_utf8,
)
from orchestrator.data.sources.digests import FileStamp, digest_of, digests, stamp_of
from orchestrator.data.sources.shard_members import shard_of
from orchestrator.data.sources.source_captions import manifest_of, table_of, table_reads_as_before
from orchestrator.errors import UserError
from orchestrator.fsio import why

# Bytes or pixels of a file that holds many pictures.
_NO_LIMIT = 2**62

# Folders by which a store is known, and all that runs make in one, MLflow's included.
_OF_EACH_STORE = frozenset({"ledger", "pipelines"})
_OF_STORES = _OF_EACH_STORE | {"artifacts", "work", "holds", "logs", "spool", "tracking", "mlartifacts"}

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class LeftOut:
    """Something below a source's folder that is not taken for a picture: its path, as it may be shown, and why.

    `kind` is the kind of the reason, one of `account.KINDS`; `pictures` how many it stands for, more than 1 only of a
    shard.
    """

    path: str
    reason: str
    kind: str = accounts.ACCESS
    pictures: int = 1


@dataclass(frozen=True)
class Listing:
    """What is below a source's folder.

    Attributes:
        files: relative posix paths of regular, readable files with the ending of a picture, sorted.
        left_out: everything else, sorted.
        stamps: size and times of each file, or of its shard, when it was listed, in the order of `files`; empty where
            they are not known.
        tags: of objects in a bucket, or of the shards there, what tells their content from another.
    """

    files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    stamps: tuple[FileStamp, ...] = field(default=(), compare=False, repr=False)
    tags: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def account(self, name: str) -> Account:
        """The files of dataset `name` by what became of them, as far as their names and sizes say."""
        taken = ((file, accounts.TAKEN, "", 1) for file in self.files)
        return accounts.account(
            name, (*taken, *((item.path, item.kind, item.reason, item.pictures) for item in self.left_out))
        )


def side_by_side(call: Callable[[T], R], items: Sequence[T], stop: threading.Event) -> list[R]:
    """What `call` makes of each item, by several threads. What ends the wait, Ctrl-C included, sets `stop`."""
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="photos")
    try:
        return list(pool.map(call, items))
    except BaseException:
        stop.set()
        raise
    finally:
        # Whoever ends this process need not wait for files that nobody asks for any more.
        pool.shutdown(wait=not stop.is_set(), cancel_futures=True)


def list_images(source: DataSource, name: str) -> Listing:
    """What is below a source's folder; nothing is opened, so that nothing there can hold this up.

    Links are followed, to files and to folders; a folder is looked at once, however many links lead to it.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not source.is_there:
        what = "is not a folder" if source.path.exists() else "does not exist"
        raise UserError(
            f"the folder {source.path} of dataset {name!r} {what}",
            where=f"data.{name}.path",
            hint="`python -m orchestrator.data.samples food data/food` fetches a small set of photos",
        )
    if not is_utf8(str(source.root)):
        raise UserError(
            f"the name of the folder {shown(str(source.root))} is not UTF-8",
            where=f"data.{name}.path",
            hint="rename it: the index of the photos holds the names of files as text",
        )
    if source.is_remote:
        listing = _of_bucket(source, name)
    elif source.manifest is not None:
        listing = _of_manifest(source, name)
    elif source.shards is not None:
        listing = _of_shards(source)
    else:
        listing = _Walk(source.path, source.max_pixels).listing()
    if source.captions is not None:
        kept = tuple(item for item in listing.left_out if not _is_captions(source, item.path))
        listing = replace(listing, left_out=kept)
    if not listing.files:
        place = "path" if source.manifest is None else "manifest"
        raise _no_images(
            source.path, listing, where=f"data.{name}.{place}", hint=_what_to_give(source, listing)
        )
    return listing


def _of_bucket(source: DataSource, name: str) -> Listing:
    """The pictures among the objects below an address: all, those of a manifest, or those in tars."""
    try:
        found = {item.path: item for item in remote.objects(source.path)}
    except UserError as error:
        raise UserError(error.what, where=f"data.{name}.path", hint=error.hint) from None
    except OSError as error:
        raise UserError(str(error), where=f"data.{name}.path", hint="run again once it answers") from error
    if source.manifest is not None:
        wanted = manifest.read(manifest_of(source, name), source.path).files
    else:
        wanted = tuple(sorted(found))
    endings = readable_endings() if source.shards is None else shards.ENDINGS[source.shards]
    files: list[str] = []
    left_out: list[LeftOut] = []
    for path in wanted:
        ending = _ending(PurePosixPath(path).name)
        if path not in found:
            left_out.append(LeftOut(shown(path), "does not exist", accounts.ACCESS))
        elif source.manifest is None and any(part.startswith(".") for part in PurePosixPath(path).parts):
            left_out.append(LeftOut(shown(path), "hidden", accounts.HIDDEN))
        elif source.manifest is None and ending.lower() not in endings:
            left_out.append(LeftOut(shown(path), *_Walk.of_no_picture(path, ending.lower())))
        elif source.shards is None and (many := too_many_bytes(found[path].size, source.max_pixels)):
            left_out.append(LeftOut(shown(path), many, accounts.TOO_LARGE))
        elif path != PurePosixPath(path).as_posix() or ".." in PurePosixPath(path).parts:
            left_out.append(LeftOut(shown(path), "no plain path", accounts.ACCESS))
        else:
            files.append(path)
    tags = {path: found[path].tag for path in files}
    if source.shards is None:
        return Listing(tuple(files), tuple(left_out), tuple(found[path].stamp for path in files), tags=tags)
    stamps = {path: found[path].stamp for path in files}
    inside = shards.contents(source.path, files, readable_endings(), stamps)
    left_out += [LeftOut(shown(path), reason, kind, count) for path, reason, kind, count in inside.left_out]
    of_shards = tuple(stamps[shard_of(file)] for file in inside.files)
    return Listing(inside.files, tuple(left_out), of_shards, tags=tags)


def _of_shards(source: DataSource) -> Listing:
    """The pictures in the shards of a folder."""
    walked = _Walk(source.path, _NO_LIMIT, shards.ENDINGS[source.shards or "tar"]).listing()
    endings = shards.ENDINGS[source.shards or "tar"]
    # A shard that may not be read hides pictures, too: its headers are asked for, and say why they cannot be had.
    closed = {
        item.path
        for item in walked.left_out
        if item.kind == accounts.ACCESS and _ending(item.path).lower() in endings
    }
    found = shards.contents(source.path, sorted({*walked.files, *closed}), readable_endings())
    kept = [item for item in walked.left_out if item.path not in closed]
    inside = [LeftOut(shown(path), reason, kind, count) for path, reason, kind, count in found.left_out]
    return Listing(found.files, (*kept, *inside))


def _of_manifest(source: DataSource, name: str) -> Listing:
    """What a manifest names; the folder is not searched."""
    files = manifest.read(manifest_of(source, name), source.path).files
    gone = {
        file: (reason, accounts.TOO_LARGE if too_large else accounts.ACCESS)
        for file, (reason, too_large) in manifest.missing(
            source.path, files, most_bytes(source.max_pixels)
        ).items()
    }
    gone |= {file: ("its name is not UTF-8", accounts.ACCESS) for file in files if not is_utf8(file)}
    left_out = tuple(LeftOut(shown(file), *why_not) for file, why_not in gone.items())
    return Listing(tuple(file for file in files if file not in gone), left_out)


def list_folder(folder: Path, max_pixels: int = MAX_PIXELS) -> Listing:
    """What is below a folder that no pipeline file names, without `stamps`; else as :func:`list_images`.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"{shown(str(folder))} {what}", where=shown(str(folder)), hint="give a folder of images"
        )
    # Nobody asks for the stamps, which take more memory than the names.
    listing = replace(_Walk(folder, max_pixels).listing(), stamps=())
    if not listing.files:
        raise _no_images(folder, listing, where=shown(str(folder)))
    return listing


def _no_images(folder: Path, listing: Listing, where: str, hint: str | None = None) -> UserError:
    return UserError(
        f"there are no images in {shown(str(folder))}" + _most_common(listing.left_out),
        where=where,
        hint=hint or f"image files end in {', '.join(sorted(readable_endings()))}",
    )


def _what_to_give(source: DataSource, listing: Listing) -> str | None:
    """What to write where a dataset has no images; None where the endings of images say it."""
    if source.manifest is not None:
        return "its paths are from the dataset's folder, with forward slashes"
    there = {_ending(item.path).lower() for item in listing.left_out}
    other = next(
        (form for form, endings in shards.ENDINGS.items() if form != source.shards and endings & there), None
    )
    if other is not None:
        return f"if the images are in files that end in .{other}, set `shards: {other}`"
    if source.shards is not None:
        return f"with `shards: {source.shards}`, images are in files that end in .{source.shards}"
    return None


def _is_captions(source: DataSource, path: str) -> bool:
    """Whether a path below the source's folder is its captions file."""
    captions = source.captions
    return captions is not None and (captions == Path(path) or captions == source.path / path)


class _Walk:
    """A walk through all folders below one: real ones before linked ones, so that a photo's path is the shorter way."""

    def __init__(self, root: Path, max_pixels: int, endings: frozenset[str] | None = None) -> None:
        self._root, self._max_pixels = root, max_pixels
        self._endings = readable_endings() if endings is None else endings
        self._files: list[str] = []
        self._stamps: dict[str, FileStamp] = {}
        self._left_out: list[LeftOut] = []
        # By device and inode: the path under which a folder was walked.
        self._walked: dict[tuple[int, int], str] = {}
        self._links: list[str] = []

    def listing(self) -> Listing:
        self._walk("")
        while self._links:
            links, self._links = sorted(self._links), []
            for link in links:
                self._walk(link)
        left_out = sorted(self._left_out, key=lambda item: (item.path, item.reason))
        files = tuple(sorted(self._files))
        return Listing(files, tuple(left_out), tuple(self._stamps[file] for file in files))

    def _walk(self, start: str) -> None:
        folders = [start]
        while folders:
            folder = folders.pop()
            try:
                status = (self._root / folder).stat()
                first = self._walked.setdefault((status.st_dev, status.st_ino), folder)
                if first != folder:
                    same = f"the same folder as {shown(first) or 'the source itself'}"
                    self._leave_out(folder, same, accounts.LINKED_FOLDER)
                    continue
                with os.scandir(self._root / folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._leave_out(folder, f"folder: {why(error)}")
                continue
            found = self._without_own(folder, found)
            folders += [inside for entry in found if (inside := self._visit(folder, entry)) is not None]

    def _without_own(self, folder: str, entries: list[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
        """What is in a folder without what runs wrote there: a dataset must not change by being trained on."""
        # Of other names nothing is asked here: a link among them may lead nowhere.
        folders = {entry.name for entry in entries if entry.name in _OF_STORES and Path(entry.path).is_dir()}
        if not folders >= _OF_EACH_STORE:
            return entries
        kept = []
        for entry in entries:
            if entry.name in folders:
                path = f"{folder}/{entry.name}" if folder else entry.name
                self._leave_out(path, "a folder of the store of a pipeline", accounts.OTHER_DATA)
            else:
                kept.append(entry)
        return kept

    def _visit(self, folder: str, entry: os.DirEntry[str]) -> str | None:
        """Take or leave one thing in a folder; returns its path if it is a folder to walk."""
        path = f"{folder}/{entry.name}" if folder else entry.name
        try:
            found = self._reason(path, entry)
            if found is None and entry.is_dir():
                if not entry.is_symlink():
                    return path
                self._links.append(path)
                return None
        except OSError as error:
            found = why(error), accounts.ACCESS
        if found is not None:
            self._leave_out(path, *found)
        else:
            self._files.append(path)
        return None

    def _reason(self, path: str, entry: os.DirEntry[str]) -> tuple[str, str] | None:
        """Why something is left out, and the kind of that; None for a picture and for a folder. Follows links."""
        if entry.name.startswith("."):
            return "hidden", accounts.HIDDEN
        if not is_utf8(entry.name):
            return "its name is not UTF-8", accounts.ACCESS
        if entry.is_dir():
            return None
        if entry.is_symlink() and not Path(entry.path).exists():
            return "a link that leads nowhere", accounts.ACCESS
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            what = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            return f"not a file but {what}", accounts.NOT_A_PICTURE
        ending = _ending(entry.name).lower()
        if ending not in self._endings:
            return self.of_no_picture(entry.name, ending)
        if not os.access(entry.path, os.R_OK):
            return "no permission to read it", accounts.ACCESS
        too_many = too_many_bytes(status.st_size, self._max_pixels)
        if too_many is not None:
            return too_many, accounts.TOO_LARGE
        self._stamps[path] = stamp_of(status)
        return None

    @staticmethod
    def of_no_picture(name: str, ending: str) -> tuple[str, str]:
        kind = accounts.OTHER_DATA if ending in accounts.BESIDE_PICTURES else accounts.ENDING
        written = _ending(name)
        return (f"{accounts.ENDS_IN}{written}" if written else accounts.NO_ENDING), kind

    def _leave_out(self, path: str, reason: str, kind: str = accounts.ACCESS) -> None:
        self._left_out.append(LeftOut(shown(path), reason, kind))


# Halves of characters but for those that stand for a byte of a file's name.
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


def _ending(name: str) -> str:
    """The ending of a name that begins with no dot, with its dot; empty without one."""
    _, dot, last = name.rpartition(".")
    return dot + last if dot and last else ""


def shown(name: str) -> str:
    """A file's name as text that any file and any terminal can take: bytes and control characters are escaped."""
    # No file can have half a character in its name, but a table or a shard can say so.
    raw = os.fsencode(name) if not _HALF.search(name) else name.encode("utf-8", "surrogatepass")
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def _most_common(left_out: Sequence[LeftOut]) -> str:
    """What was left out, by reason, for the end of a sentence."""
    counts = Counter(item.reason for item in left_out).most_common(3)
    return ", only: " + "; ".join(f"{count} × {reason}" for reason, count in counts) if counts else ""


def fingerprint(source: DataSource, name: str = "data", listing: Listing | None = None) -> str:
    """A hash of what is in a source: paths and contents of all image files, and of the captions file.

    Equal for equal content wherever the folder lies and whenever it was written (sha256, 64 hex digits). A file that
    cannot be read is not part of it, as it is not part of what is trained on. A file that has not changed since it was
    read for this is not read again.

    Args:
        source: the folder.
        name: the source's name, for messages.
        listing: what is in the folder, where it is known; else it is looked up.

    Raises:
        UserError: as :func:`scan`, except for what the captions file says.
    """
    listing = listing or list_images(source, name)
    files, stamps, most = listing.files, listing.stamps, most_bytes(source.max_pixels)
    if source.shards is not None:
        files, stamps, most = tuple(sorted({shard_of(file) for file in files})), (), _NO_LIMIT
    captions = table_of(source, name)
    stop = threading.Event()
    if source.is_remote:
        found: list[str | None] = [listing.tags.get(file) for file in files]
    else:
        found = digests(source.path, files, most, stop, partial(side_by_side, stop=stop), stamps)
    whole = hashlib.sha256()
    for file, digest in zip(files, found, strict=True):
        if digest is not None:
            whole.update(f"{len(file)}:{file}={digest};".encode())
    whole.update(f"captions={digest_of(captions, MOST_BYTES, stop) if captions else None}".encode())
    if captions is not None and not table_reads_as_before(captions):
        # Versions that did not know such a header made something else of it.
        whole.update(b"captions with a loose header")
    if source.max_pixels != MAX_PIXELS:
        whole.update(f"max_pixels={source.max_pixels}".encode())
    if source.manifest is not None:
        path = manifest_of(source, name)
        whole.update(f"manifest={digest_of(path, MOST_BYTES, stop)}".encode())
        if manifest.read(path, source.path).said.weights:
            # Versions that did not read them made something else of it.
            whole.update(b"weights")
    if source.shards is not None:
        whole.update(f"shards={source.shards} {sorted(readable_endings())}".encode())
    if source.labels is not None:
        whole.update(f"labels={source.labels}".encode())
    if source.pixels is not None:
        whole.update(f"pixels={json.dumps(source.pixels.record(), separators=(',', ':'))}".encode())
    return whole.hexdigest()
