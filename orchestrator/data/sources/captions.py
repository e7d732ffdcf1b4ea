"""The captions file of a dataset: a table with a `file` column and, as there are, `caption` and `label`.

It is read as people write it: with or without a byte order mark, with commas, semicolons or tabs, with spaces and
capitals in its header, and with names of files that are absolute, begin with `./`, or are in another Unicode form
than the file system's.
"""

from __future__ import annotations

import csv
import io
import math
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TextIO

from orchestrator.errors import UserError, nearest, shortened
from orchestrator.fsio import open_regular

FILE, CAPTION, LABEL = "file", "caption", "label"
_COLUMNS = (FILE, CAPTION, LABEL)
# What else people call them.
_SYNONYMS = {
    FILE: ("filename", "file_name", "filepath", "file_path", "path", "image", "image_path", "photo"),
    CAPTION: ("captions", "text", "description", "title"),
    LABEL: ("labels", "category", "class", "class_name"),
}
_DELIMITERS = (",", ";", "\t")
# Names of a folder that are looked through for the nearest one.
_LOOKED_THROUGH = 2000
_SHOWN = 3
# A file that has more, or a line that is longer, is not a table that anybody wrote: it is not read.
MOST_BYTES = 16 << 30
_LONGEST_LINE = 16 << 20
# What follows the last line: a value whose quote is not closed ends in it.
_END = "\ue000the end of the captions file\ue000"
# Columns of a table; one that has more is something else.
_MOST_COLUMNS = 1000

Note = tuple[str | None, str | None]


@dataclass(frozen=True)
class Captions:
    """What a captions file says.

    Attributes:
        notes: caption and label by the photo's path from the source's folder; None where there is none.
        warnings: what is read, but probably not as it was meant; each with file and line.
        more: all captions of the photos that have several.
        weights: how often photos are drawn beside others, where a manifest says it; 1 of others.
    """

    notes: Mapping[str, Note]
    warnings: tuple[UserError, ...] = ()
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_captions(self) -> int:
        """Photos with a caption."""
        return sum(bool((caption or "").strip()) for caption, _ in self.notes.values())

    @property
    def num_labels(self) -> int:
        """Photos with a label."""
        return sum(bool((label or "").strip()) for _, label in self.notes.values())

    def of(self, files: Sequence[str]) -> Captions:
        """What is said of these photos."""
        kept = frozenset(files)
        return replace(
            self,
            notes={file: note for file, note in self.notes.items() if file in kept},
            more={file: texts for file, texts in self.more.items() if file in kept},
            weights={file: weight for file, weight in self.weights.items() if file in kept},
        )


def read(path: Path, root: Path, files: Sequence[str]) -> Captions:
    """Read a captions file. Of two rows for one photo, the later one counts.

    Args:
        path: the file.
        root: the source's folder.
        files: paths of the source's photos from `root`, posix.

    Raises:
        UserError: it cannot be read, has no `file` column or one of the three twice, or names files that are not among
            `files`.
    """
    table = DelimitedTable(path)
    names = _PhotoNames(root, files)
    warnings = table.odd_columns()
    notes: dict[str, Note] = {}
    unknown: dict[str, int] = {}
    clashes: dict[str, int] = {}
    longer: list[int] = []
    swallowing: list[int] = []
    for line, row in table.rows():
        if len(row) > len(table.columns):
            longer.append(line)
        written, note = table.read(row)
        if not written and note == (None, None):
            continue
        file = names.find(written)
        if file is None:
            unknown.setdefault(written, line)
            continue
        if notes.get(file, note) != note:
            clashes.setdefault(file, line)
        notes[file] = note
        if any(_swallows(value, table.delimiter, names) for value in row):
            swallowing.append(line)
    if unknown:
        raise _unknown(path, unknown, names, root, found_any=bool(notes))
    if clashes:
        warnings.append(_clashing(path, clashes))
    if longer:
        warnings.append(_too_long(path, longer, len(table.columns)))
    if swallowing:
        warnings.append(_unclosed(path, swallowing))
    return Captions(notes, tuple(warnings))


def reads_as_before(path: Path) -> bool:
    """Whether the header is one that was always read as it is now: with commas, and without spaces or capitals.

    A file with another header was once read without its captions, or refused.

    Raises:
        UserError: it cannot be read, has no `file` column, or one of the three twice.
    """
    return not DelimitedTable(path).is_loose


class DelimitedTable:
    """The header and the rows of a file of comma-separated values, or ones with another delimiter.

    Args:
        path: the file.
        renamed: other names of columns, and the ones that they stand for.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None) -> None:
        self._path, self._renamed = path, renamed or {}
        header = next(self._lines(","), (0, []))[1]
        self.delimiter = ","
        for delimiter in _DELIMITERS:
            row = next(self._lines(delimiter), (0, []))[1]
            if FILE in map(self._named, row):
                self.delimiter, header = delimiter, row
                break
        if len(header) > _MOST_COLUMNS:
            what = f"the captions file has {len(header):,} columns, more than {_MOST_COLUMNS:,}"
            hint = "its first line names the columns: file, caption and label"
            raise UserError(what, where=f"{path}:1", hint=hint)
        self.columns = [self._named(name) for name in header]
        self.is_loose = self._skips_spaces(self.delimiter) or any(
            bare != name for name, bare in zip(header, self.columns, strict=True) if bare in _COLUMNS
        )
        if FILE not in self.columns:
            raise self._no_file(header)
        if twice := [name for name in _COLUMNS if self.columns.count(name) > 1]:
            what = f"the captions file has more than one `{twice[0]}` column"
            hint = "rename or remove all but one of them"
            raise UserError(what, where=f"{path}:1", hint=hint)
        self._at = {name: self.columns.index(name) for name in _COLUMNS if name in self.columns}

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Every row below the header, with the line that it ends on."""
        lines = self._lines(self.delimiter)
        next(lines, None)
        yield from (found for found in lines if found[1])

    def read(self, row: Sequence[str]) -> tuple[str, Note]:
        """The name of a row's file as it was written, and what is noted of it."""

        def value(name: str) -> str:
            at = self._at.get(name)
            found = row[at] if at is not None and at < len(row) else ""
            return found.strip() if self.is_loose else found

        return value(FILE), (value(CAPTION) or None, value(LABEL) or None)

    def _named(self, column: str) -> str:
        """What a column is called here, without spaces around it and capitals."""
        bare = _bare(column)
        return self._renamed.get(bare, bare)

    def odd_columns(self) -> list[UserError]:
        """Columns that are not read and whose names come close to ones that are, or mean the same."""
        found = []
        lacking = [other for other in (CAPTION, LABEL) if other not in self.columns]
        for name in dict.fromkeys(self.columns):
            close = next((other for other in lacking if name in _SYNONYMS[other]), None) or nearest(
                name, lacking
            )
            if name not in _COLUMNS and close is not None:
                what = f"the column {name!r} of the captions file is not read"
                hint = f"rename it to {close!r}, if that is what it holds"
                found.append(UserError(what, where=f"{self._path}:1", hint=hint))
        return found

    def _lines(self, delimiter: str) -> Iterator[tuple[int, list[str]]]:
        line = 0
        try:
            skips = self._skips_spaces(delimiter)
            with _opened(self._path) as file:
                reader = csv.reader(self._texts(file), delimiter=delimiter, skipinitialspace=skips)
                for row in reader:
                    if row == [_END]:
                        break
                    if row and row[-1].endswith(_END):
                        raise UserError(
                            "a quote in the last row of the captions file is not closed",
                            where=f"{self._path}:{line + 1}",
                            hint='close the quote; a quote inside a quoted text is written twice, ""',
                        )
                    line = reader.line_num
                    if any("\0" in value for value in row):
                        raise UserError(
                            "a row of the captions file has a NUL character in it",
                            where=f"{self._path}, row that ends on line {line}",
                            hint="remove the character: it is not part of a text",
                        )
                    yield line, row
        except csv.Error as error:
            raise UserError(
                f"the captions file cannot be read: {error}",
                where=f"{self._path}:{line + 1}",
                hint="close every quote: without its end a value reaches to the end of the file",
            ) from error
        except OSError as error:
            raise UserError(f"the captions file cannot be read: {error}", where=str(self._path)) from error
        except UnicodeDecodeError as error:
            hint = "save it as UTF-8"
            what = f"the captions file is not UTF-8: {error}"
            raise UserError(what, where=str(self._path), hint=hint) from error

    def _texts(self, file: TextIO) -> Iterator[str]:
        """The lines of the file, and the mark of its end."""
        number = 0
        while text := file.readline(_LONGEST_LINE):
            number += 1
            if len(text) == _LONGEST_LINE:
                raise UserError(
                    f"a line of the captions file has more than {_LONGEST_LINE:,} characters",
                    where=f"{self._path}:{number}",
                    hint="name a table with a line for each photo",
                )
            yield text
        yield _END

    def _skips_spaces(self, delimiter: str) -> bool:
        """Whether a value, or the quote that it is in, begins after the spaces: where the header has them, rows do."""
        if delimiter != ",":
            return True
        with _opened(self._path) as file:
            return ", " in file.readline(1 << 16)

    def _no_file(self, header: Sequence[str]) -> UserError:
        # Which delimiter it has is not known without a `file` column: it is the one that makes most columns.
        rows = [next(self._lines(delimiter), (0, []))[1] for delimiter in _DELIMITERS]
        header = max([list(header), *rows], key=len)
        columns = [_bare(name) for name in header]
        near = next((name for name in columns if name in _SYNONYMS[FILE]), None) or nearest(FILE, columns)
        return UserError(
            f"the captions file has no `file` column, only {shortened(', '.join(header), 300) or 'nothing'}",
            where=str(self._path),
            hint=f"rename the column {near!r} to `file`" if near else "its first line names the columns",
        )


def _opened(path: Path) -> TextIO:
    """The captions file as text with its line ends as they are.

    Raises:
        UserError: it has more bytes than are read.
        OSError: it cannot be opened.
    """
    file = open_regular(path)
    size = os.fstat(file.fileno()).st_size
    if size > MOST_BYTES:
        file.close()
        raise UserError(
            f"the captions file has {size:,} bytes, more than {MOST_BYTES:,}",
            where=str(path),
            hint="name a table with a line for each photo",
        )
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


class _PhotoNames:
    """The photos of a source by the names that a captions file may give them."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._files = files
        self._exact = frozenset(files)
        self._by_form: dict[str, str] = {}
        # Of two files whose names differ in their Unicode form alone, a name in a third form means the first.
        for file in files:
            self._by_form.setdefault(_form(file), file)
        self._roots = [_form(str(folder)).rstrip("/") + "/" for folder in (root.absolute(), root.resolve())]
        self._by_last: dict[str, str] = {}

    def find(self, written: str) -> str | None:
        """The photo that a name means, or None."""
        if written in self._exact:
            return written
        name = _form(written.strip())
        for root in self._roots:
            name = name.removeprefix(root)
        # Absolute names keep their slash, and `..` stays: it leads out of the folder, or is not the name of a listing.
        return self._by_form.get(PurePosixPath(name).as_posix())

    def near(self, written: str) -> str | None:
        """The photo that a name that means none was probably to mean: of the same last part, or a like one."""
        if not self._by_last:
            for file in self._files:
                self._by_last.setdefault(_form(PurePosixPath(file).name).casefold(), file)
        last = PurePosixPath(_form(written.strip()).replace("\\", "/")).name.casefold()
        if last in self._by_last:
            return self._by_last[last]
        close = nearest(last, list(self._by_last)[:_LOOKED_THROUGH])
        return None if close is None else self._by_last[close]


def is_utf8(text: str) -> bool:
    """Whether a text, or the name of a file, can be written as UTF-8: it has no half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(value: object) -> str | None:
    """A caption or label of JSON or Parquet as a text: of a list its first; None where there is none.

    Half a character becomes a question mark, as no file of ours can hold it.
    """
    if isinstance(value, (list, tuple)):
        return next((text for one in value if not isinstance(one, list) and (text := text_of(one))), None)
    if isinstance(value, float):
        # Tables write whole numbers as 7.0 where some rows have none.
        value = "" if math.isnan(value) else int(value) if value.is_integer() else value
    if not isinstance(value, (str, int, float)):
        return None
    return str(value).encode("utf-8", "replace").decode().strip() or None


def _bare(name: str) -> str:
    """A column's name without spaces around it and capitals."""
    return name.strip().casefold()


def _form(name: str) -> str:
    """A name in one Unicode form: some systems write é as one character, others as two."""
    return unicodedata.normalize("NFC", name)


def _unknown(
    path: Path, unknown: Mapping[str, int], names: _PhotoNames, root: Path, *, found_any: bool
) -> UserError:
    first, line = next(iter(unknown.items()))
    shown = ", ".join(shortened(name, 100) for name in sorted(unknown)[:_SHOWN])
    near = names.near(first)
    count = "1 file" if len(unknown) == 1 else f"{len(unknown)} files"
    if not found_any:
        what = f"none of the names in the captions file, {count}, is an image in {root}: {shown}"
    else:
        what = f"the captions file names {count} that are not images in {root}: {shown}"
    meant = f"{shortened(first, 100)!r} on line {line}: did you mean {near!r}? " if near else ""
    rule = "`file` is the path from the source's folder, with forward slashes"
    return UserError(what, where=f"{path}:{line}", hint=f"{meant}{rule}")


def _clashing(path: Path, clashes: Mapping[str, int]) -> UserError:
    first, line = next(iter(clashes.items()))
    photos = "1 photo has" if len(clashes) == 1 else f"{len(clashes)} photos have"
    return UserError(
        f"{photos} different rows in the captions file, such as {shortened(first, 100)}; the last row is used",
        where=f"{path}:{line}",
        hint="leave one row for each photo",
    )


def _too_long(path: Path, lines: Sequence[int], width: int) -> UserError:
    rows = "1 row" if len(lines) == 1 else f"{len(lines)} rows"
    return UserError(
        f"{rows} of the captions file have more values than the {width} columns; the extra values are ignored",
        where=f"{path}:{lines[0]}",
        hint="put a text with the delimiter in it into double quotes",
    )


def _swallows(value: str, delimiter: str, names: _PhotoNames) -> bool:
    """Whether a later line of a value begins with a photo's name and a delimiter, as a row does."""
    return any(
        delimiter in line and names.find(line.partition(delimiter)[0].strip('"')) is not None
        for line in value.splitlines()[1:]
    )


def _unclosed(path: Path, lines: Sequence[int]) -> UserError:
    values = "1 value" if len(lines) == 1 else f"{len(lines)} values"
    return UserError(
        f"{values} of the captions file contain lines that look like rows: a quote is probably not closed",
        where=f"{path}, row that ends on line {lines[0]}",
        hint='close the quote before the row; a quote inside a quoted text is written twice, ""',
    )


def captions_path(captions: Path, root: Path) -> Path | None:
    """A captions file as it is given, or else inside the source's folder; None if it is in neither place."""
    return next((path for path in (captions, root / captions) if path.is_file()), None)


def read_column(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Line, name of the file as it is written, and value of one column; rows without a value are left out.

    Args:
        path: a captions file, or another table with a `file` column.
        column: the name of the column; capitals and spaces around it do not count.

    Raises:
        UserError: the file cannot be read, or has no such column, or has it twice.
    """
    table = DelimitedTable(path)
    wanted = _bare(column)
    if table.columns.count(wanted) != 1:
        close = nearest(wanted, table.columns)
        raise UserError(
            f"the table has {'no' if wanted not in table.columns else 'more than one'} column {column!r}",
            where=f"{path}:1",
            hint=f"did you mean {close!r}?"
            if close and close != wanted
            else "its first line names the columns",
        )
    at = table.columns.index(wanted)
    for line, row in table.rows():
        value = row[at].strip() if at < len(row) else ""
        if value:
            yield line, table.read(row)[0], value
