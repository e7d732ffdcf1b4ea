"""What is in a folder of images: every file decoded once, hashed, and joined with its caption and label."""

from __future__ import annotations

import csv
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.decode import UnreadableImage, decode_rgb
from orchestrator.errors import UserError, nearest
from orchestrator.spec import DataSource

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Photo:
    """One image file of a source, readable or not.

    Attributes:
        source: the source's name in the pipeline file.
        path: relative to the source's folder, posix.
        sha256: of the file's bytes.
        bytes: the file's size.
        width, height: decoded, upright, in pixels; 0 if unreadable.
        caption, label: from the captions file; None where it says nothing.
        error: why the file cannot be decoded, or None.
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


def scan(source: DataSource, name: str) -> list[Photo]:
    """All image files below the source's folder in order of their paths, each fully decoded.

    Raises:
        UserError: no such folder, no images in it, or a captions file that is missing, lacks a `file` column,
            or names files that do not exist.
    """
    files = image_files(source, name)
    notes = _captions(source, name, files)

    def look(relative: str) -> Photo:
        caption, label = notes.get(relative, (None, None))
        data, error = b"", None
        width = height = 0
        try:
            data = (source.path / relative).read_bytes()
            height, width, _ = decode_rgb(data, relative).shape
        except OSError as problem:
            error = problem.strerror or str(problem)
        except UnreadableImage as problem:
            error = problem.reason
        digest = hashlib.sha256(data).hexdigest()
        return Photo(name, relative, digest, len(data), width, height, caption, label, error)

    # The decoders release the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(look, files))


def image_files(source: DataSource, name: str) -> list[str]:
    """Relative posix paths of the image files below a source's folder, sorted; hidden ones are left out."""
    if not source.path.is_dir():
        what = "is not a folder" if source.path.exists() else "does not exist"
        raise UserError(
            f"the folder {source.path} of data source {name!r} {what}",
            where=f"data.{name}.path",
            hint="`python -m orchestrator.data.samples food data/food` fetches a small set of photos",
        )
    files: list[str] = []
    for folder, subfolders, names in os.walk(source.path):
        subfolders[:] = [sub for sub in subfolders if not sub.startswith(".")]
        inside = Path(folder).relative_to(source.path)
        files += [
            (inside / file).as_posix()
            for file in names
            if not file.startswith(".") and Path(file).suffix.lower() in SUFFIXES
        ]
    if not files:
        raise UserError(
            f"there are no images in {source.path}",
            where=f"data.{name}.path",
            hint=f"image files end in {', '.join(sorted(SUFFIXES))}",
        )
    return sorted(files)


def fingerprint(source: DataSource, name: str = "data") -> str:
    """A hash of what is in a source: paths and contents of all image files, and of the captions file.

    Equal for equal content wherever the folder lies and whenever it was written (sha256, 64 hex digits).

    Raises:
        UserError: as :func:`scan`, except for what the captions file says.
    """
    files = image_files(source, name)
    captions = _captions_path(source, name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_file_digest, [source.path / file for file in files]))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{len(file)}:{file}={digest};".encode())
    whole.update(f"captions={_file_digest(captions) if captions else None}".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _captions_path(source: DataSource, name: str) -> Path | None:
    """The captions file as given, or else inside the source's folder."""
    if source.captions is None:
        return None
    for path in (source.captions, source.path / source.captions):
        if path.is_file():
            return path
    raise UserError(
        f"the captions file {source.captions} of data source {name!r} does not exist",
        where=f"data.{name}.captions",
        hint="give its path from here or from the source's folder",
    )


def _captions(source: DataSource, name: str, files: list[str]) -> dict[str, tuple[str | None, str | None]]:
    """Caption and label by relative path."""
    path = _captions_path(source, name)
    if path is None:
        return {}
    notes: dict[str, tuple[str | None, str | None]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if "file" not in columns:
                near = nearest("file", columns)
                raise UserError(
                    f"the captions file has no `file` column, only {', '.join(columns) or 'nothing'}",
                    where=str(path),
                    hint=f"rename the column {near!r} to `file`"
                    if near
                    else "its first line names the columns",
                )
            for row in reader:
                notes[row["file"]] = (row.get("caption") or None, row.get("label") or None)
    except UnicodeDecodeError as error:
        raise UserError(f"the captions file is not UTF-8: {error}", where=str(path)) from error
    missing = sorted(set(notes) - set(files))
    if missing:
        raise UserError(
            f"the captions file names {len(missing)} files that are not images in {source.path}: "
            + ", ".join(missing[:3]),
            where=str(path),
            hint="`file` is the path from the source's folder, with forward slashes",
        )
    return notes
