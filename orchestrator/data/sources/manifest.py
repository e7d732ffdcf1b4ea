"""A manifest: a table with a row for each picture of a dataset, as CSV, JSON lines or Parquet.

Only what it names is in the dataset, whatever else is in the folder and whatever its files are called. The folder is
not searched. Its columns are `path` (or `file`), from the dataset's folder, and as there are `caption` or `captions`,
and `label` or `labels`: texts, in JSON lines and Parquet also lists of texts; `weight`, how often a picture is drawn
beside others; and `mask`, a file with a class for every pixel. Several rows for one picture are several captions of it.
In Parquet, `mask` may hold the bytes of these files, see :func:`mask_bytes`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from orchestrator.data.sources.captions import Captions, DelimitedTable, Note, is_utf8
from orchestrator.errors import UserError, first_line, nearest, shortened
from orchestrator.fsio import open_regular, why

# What its columns may be called, by what they are.
_NAMES = {
    "file": ("path", "file"),
    "caption": ("caption", "captions"),
    "label": ("label", "labels"),
    "weight": ("weight", "weights"),
    "mask": ("mask", "masks"),
}
COLUMNS = {name: what for what, names in _NAMES.items() for name in names if name != what}
_TOLD = frozenset(name for names in _NAMES.values() for name in names)
_TABLES, _LINES, _PARQUET = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet", ".pq")
ENDINGS = (*_TABLES, *_LINES, *_PARQUET)
_LONGEST_LINE = 16 << 20
_BATCH_ROWS = 1 << 16
# Rows of masks that are in memory at once: each is a picture.
_BATCH_MASKS = 64


@dataclass(frozen=True)
class PhotoManifest:
    """What a manifest says.

    Attributes:
        files: the pictures that it names, sorted posix paths from the dataset's folder, each once.
        said: their captions, labels and weights.
        masks: paths of masks from the dataset's folder, by picture, where the manifest has some.
    """

    files: tuple[str, ...]
    said: Captions
    masks: Mapping[str, str] = field(default_factory=dict)


def read(path: Path, root: Path) -> PhotoManifest:
    """Read a manifest; one that has not changed since this process read it is not read again.

    Args:
        path: the table.
        root: the dataset's folder.

    Raises:
        UserError: it cannot be read, is none, or names files outside of the folder.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"the manifest cannot be read: {why(error)}", where=str(path)) from error
    return _read(path, root, (status.st_size, status.st_mtime_ns, status.st_ino))


@functools.lru_cache(maxsize=4)
def _read(path: Path, root: Path, look: tuple[int, ...]) -> PhotoManifest:
    """As :func:`read`; `look` tells one state of the file from another."""
    roots = _roots(root)
    captions: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    weights: dict[str, float] = {}
    masks: dict[str, str] = {}
    several: list[int] = []
    for line, row in _rows(path):
        file = _inside(row["file"], roots, path, line)
        known = captions.setdefault(file, [])
        known += [text for text in _texts(row.get("caption"), path, line) if text not in known]
        found = _texts(row.get("label"), path, line)
        if len(found) > 1 or (found and labels.get(file, found[0]) != found[0]):
            several.append(line)
        if found:
            labels.setdefault(file, found[0])
        if (weight := _weight(row.get("weight"), path, line)) is not None:
            _one_each("weight", weights, file, weight, path, line)
        if written := _texts(row.get("mask"), path, line):
            for name in written:
                _one_each("mask", masks, file, _inside(name, roots, path, line), path, line)
    if not captions:
        raise UserError(
            "the manifest names no pictures", where=str(path), hint="give it a row for each picture"
        )
    if len(weights) == len(captions) and not any(weights.values()):
        raise UserError(
            "all pictures of the manifest have a weight of 0, so none would be drawn",
            where=str(path),
            hint="give the pictures to draw a weight above 0, or leave the column out",
        )
    notes: dict[str, Note] = {
        file: (texts[0] if texts else None, labels.get(file)) for file, texts in captions.items()
    }
    more = {file: tuple(texts) for file, texts in captions.items() if len(texts) > 1}
    said = Captions(notes, tuple(_warnings(path, several)), more, weights)
    return PhotoManifest(tuple(sorted(captions)), said, masks)


def _warnings(path: Path, several: Sequence[int]) -> Iterator[UserError]:
    if several:
        rows = "1 row" if len(several) == 1 else f"{len(several):,} rows"
        yield UserError(
            f"{rows} of the manifest give a picture more than one label; its first is used",
            where=f"{path}:{several[0]}",
            hint="give each picture one label",
        )


def missing(root: Path, files: Sequence[str], most: int) -> dict[str, tuple[str, bool]]:
    """Of files that a manifest names, those that cannot be pictures: why, and whether they are too large.

    Args:
        root: the dataset's folder.
        files: paths from it.
        most: the most bytes that a picture of the dataset can have.
    """
    found = {}
    for file in files:
        try:
            status = (root / file).stat()
        except (OSError, ValueError) as error:
            reason = why(error) if isinstance(error, OSError) else str(error)
            found[file] = ("does not exist" if isinstance(error, FileNotFoundError) else reason, False)
            continue
        if not stat.S_ISREG(status.st_mode):
            found[file] = "not a file", False
        elif status.st_size > most:
            found[file] = f"{status.st_size:,} bytes are more than a picture within `max_pixels` takes", True
        elif not os.access(root / file, os.R_OK):
            found[file] = "no permission to read it", False
    return found


def place_of(written: str, root: Path, path: Path, line: int) -> str:
    """A name in a manifest as a posix path from the dataset's folder; raises UserError of one that is outside."""
    return _inside(written, _roots(root), path, line)


def _roots(root: Path) -> list[str]:
    return [f"{folder.as_posix().rstrip('/')}/" for folder in (root.absolute(), root.resolve())]


def _inside(written: str, roots: Sequence[str], path: Path, line: int) -> str:
    """A name in a manifest as a posix path from the dataset's folder."""
    name = written.strip()
    for root in roots:
        name = name.removeprefix(root)
    found = PurePosixPath(name)
    parts = [part for part in found.parts if part != "."]
    if not parts or found.is_absolute() or ".." in parts or "\0" in name:
        raise UserError(
            f"the manifest names {shortened(repr(written), 200)}, which is not a file in {roots[0]}",
            where=f"{path}:{line}",
            hint="`path` is the path from the dataset's folder, with forward slashes",
        )
    return "/".join(parts)


def _texts(value: Any, path: Path, line: int) -> list[str]:
    """The texts of a cell: of one, of a list, or none."""
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    found = []
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)):
            raise UserError(
                f"a text of the manifest is {shortened(repr(one), 80)}",
                where=f"{path}:{line}",
                hint="give a text, or a list of texts",
            )
        # Tables write what is not there as NaN, too, and whole numbers beside it as 7.0.
        if isinstance(one, float):
            one = "" if math.isnan(one) else int(one) if one.is_integer() else one
        text = str(one).strip()
        if not is_utf8(text):
            raise UserError(
                f"a text of the manifest has half a character: {shortened(ascii(text), 80)}",
                where=f"{path}:{line}",
                hint="write a character above U+FFFF as itself, or as both of its halves",
            )
        if text:
            found.append(text)
    return found


def _weight(value: Any, path: Path, line: int) -> float | None:
    """The number in a cell; None where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    # Tables write what is not there as NaN, too.
    if math.isnan(number) and not isinstance(value, str):
        return None
    if not 0 <= number < math.inf:
        raise UserError(
            f"a weight of the manifest is {shortened(repr(value), 80)}",
            where=f"{path}:{line}",
            hint="give a number of at least 0; a picture of weight 2 is drawn twice as often as one of weight 1, the "
            "default",
        )
    return number


T = TypeVar("T")


def _one_each(what: str, known: dict[str, T], file: str, value: T, path: Path, line: int) -> None:
    """Note what a picture can have one of."""
    if known.setdefault(file, value) != value:
        raise UserError(
            f"the manifest gives {shortened(file, 200)} the {what}s {known[file]} and {value}",
            where=f"{path}:{line}",
            hint=f"give each picture one {what}",
        )


# --- rows of the three forms ----------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line or row number, and cells by the keys of `_NAMES`."""
    ending = path.suffix.lower()
    if ending in _TABLES:
        yield from _of_table(path)
    elif ending in _LINES:
        yield from _of_lines(path)
    elif ending in _PARQUET:
        yield from _of_parquet(path)
    else:
        raise UserError(
            f"a manifest ends in {', '.join(ENDINGS)}, and this one in {ending or 'nothing'}", where=str(path)
        )


def _of_table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        table = DelimitedTable(path, COLUMNS)
        more = {name: at for at, name in enumerate(table.columns) if name in ("weight", "mask")}
        if twice := [name for name in more if table.columns.count(name) > 1]:
            raise _both(path, 1, twice[0], twice[0])
        for line, row in table.rows():
            written, (caption, label) = table.read(row)
            found = {"file": written, "caption": caption, "label": label}
            found |= {name: row[at].strip() for name, at in more.items() if at < len(row)}
            if any(found.values()):
                yield line, found
    except UserError as error:
        what = error.what.replace("captions file", "manifest").replace("`file` column", "`path` column")
        raise UserError(
            what, where=error.where, hint=(error.hint or "").replace("`file`", "`path`")
        ) from None


def _of_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # A later line may have what an earlier one lacks: by the columns that are read of it.
    known: dict[tuple[str, ...], dict[str, str]] = {}
    line = 0
    try:
        with open_regular(path) as file:
            while text := file.readline(_LONGEST_LINE):
                line += 1
                if not text.strip():
                    continue
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise ValueError("it is not an object")
                there = tuple(name for name in record if name.strip().casefold() in _TOLD)
                named = known.get(there) or _columns(path, list(record), line)
                known[there] = named
                found = {what: record.get(column) for what, column in named.items()}
                if not isinstance(found["file"], str):
                    raise ValueError(f"its {named['file']!r} is not a text")
                yield line, found
    except OSError as error:
        raise UserError(f"the manifest cannot be read: {why(error)}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"line {line} of the manifest cannot be read: {shortened(first_line(error), 200)}",
            where=f"{path}:{line}",
            hint='each line is an object, such as {"path": "a.jpg", "caption": "a leaf"}',
        ) from error


def _of_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            named = _columns(path, file.schema_arrow.names, 1)
            if _bytes_column(file, named) is not None:
                del named["mask"]
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(named.values())):
                cells = {what: batch.column(column).to_pylist() for what, column in named.items()}
                for number in range(len(batch)):
                    row += 1
                    found = {what: column[number] for what, column in cells.items()}
                    if not isinstance(found["file"], str):
                        raise ValueError(f"`{named['file']}` of row {row} is not a text")
                    yield row, found
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"the manifest cannot be read: {shortened(first_line(error), 200)}", where=str(path)
        ) from error


def mask_bytes(path: Path) -> Iterator[tuple[int, str, bytes]]:
    """Of a Parquet manifest whose column of masks holds files instead of paths, each mask.

    Args:
        path: the table.

    Returns:
        The number of the row, the path of its picture as written, and the bytes; nothing of other tables, and of rows
        without a mask.

    Raises:
        UserError: the manifest cannot be read.
    """
    if path.suffix.lower() not in _PARQUET:
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            named = _columns(path, file.schema_arrow.names, 1)
            column = _bytes_column(file, named)
            if column is None:
                return
            for batch in file.iter_batches(_BATCH_MASKS, columns=[named["file"], named["mask"]]):
                masks = batch.column(named["mask"])
                if pa.types.is_struct(masks.type):
                    masks = masks.field("bytes")
                for picture, mask in zip(
                    batch.column(named["file"]).to_pylist(), masks.to_pylist(), strict=True
                ):
                    row += 1
                    if mask:
                        yield row, str(picture), mask
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"the manifest cannot be read: {shortened(first_line(error), 200)}", where=str(path)
        ) from error


def _bytes_column(file: Any, named: Mapping[str, str]) -> str | None:
    """The column of masks if it holds bytes, alone or as the `bytes` of a struct; None if it holds paths."""
    import pyarrow as pa

    if "mask" not in named:
        return None
    kind = file.schema_arrow.field(named["mask"]).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    is_binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return named["mask"] if is_binary else None


def _columns(path: Path, columns: Sequence[str], line: int) -> dict[str, str]:
    """The columns that are read, by what they are."""
    bare: dict[str, str] = {}
    for name in columns:
        plain = name.strip().casefold()
        if plain in bare and plain in _TOLD:
            raise _both(path, line, bare[plain], name)
        bare[plain] = name
    found = {}
    for what, names in _NAMES.items():
        there = [bare[name] for name in names if name in bare]
        if len(there) > 1:
            raise _both(path, line, *there[:2])
        if there:
            found[what] = there[0]
    if "file" not in found:
        near = next((name for name in bare if name in ("filename", "file_name", "image", "image_path")), None)
        near = near or nearest("path", list(bare))
        raise UserError(
            f"the manifest has no `path` column, only {shortened(', '.join(map(str, columns)), 300) or 'nothing'}",
            where=f"{path}:{line}",
            hint=f"rename {near!r} to `path`" if near else "`path` is the path from the dataset's folder",
        )
    return found


def _both(path: Path, line: int, first: str, other: str) -> UserError:
    return UserError(
        f"the manifest has the columns {first!r} and {other!r}",
        where=f"{path}:{line}",
        hint="leave one of them",
    )
