"""The split of a file by what a pipeline file names: components, folders, lists of files, or values of a column."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq

from orchestrator.config.schema import DataSource
from orchestrator.config.split import SPLITS, Split, SplitName
from orchestrator.data.index import ImageIndex
from orchestrator.data.sources.captions import captions_path, read_column
from orchestrator.errors import UserError, nearest, shortened
from orchestrator.fsio import why

_PROVENANCE = "provenance.parquet"
# What the curation says of a copy whose picture is the same in every pixel.
_SAME = ("the same bytes", "the same pixels")
# Names that a misspelt one is compared with.
_LOOKED_THROUGH = 2000


@dataclass(frozen=True)
class _Copy:
    """A file that the index has not, as it has the same picture under another name."""

    source: str
    path: str
    of: str
    same: bool


@dataclass(frozen=True)
class KnownFiles:
    """What the maker of an index says of all files that it saw; nothing where it left no record."""

    names: frozenset[str] = frozenset()
    copies: tuple[_Copy, ...] = ()


def files_of(folder: Path | None) -> KnownFiles:
    """What the provenance in an artifact's folder says; nothing where there is none."""
    path = folder / _PROVENANCE if folder is not None else None
    if path is None or not path.is_file():
        return KnownFiles()
    with pq.ParquetFile(path) as file:
        columns = ("source", "path", "status", "reason", "duplicate_of")
        if not set(columns) <= set(file.schema_arrow.names):
            return KnownFiles()
        rows = file.read(columns=list(columns)).to_pylist()
    return KnownFiles(
        frozenset(f"{row['source']}/{row['path']}" for row in rows),
        tuple(
            _Copy(row["source"], row["path"], row["duplicate_of"], str(row["reason"]).startswith(_SAME))
            for row in rows
            if row["status"] == "duplicate" and row["duplicate_of"]
        ),
    )


# The split of a file by its source, its path in it, and its component.
SplitOf = Callable[[str, str, str], SplitName | None]


def split_of(
    index: ImageIndex, split: Split, known: KnownFiles, sources: Mapping[str, DataSource], where: str
) -> SplitOf:
    """How the split of a file is found, by what `split` names.

    Args:
        sources: the datasets, for the captions files that `by: column` reads.
        where: key path of `split`, for messages.

    Raises:
        UserError: a name that is not a picture, folder, component or value; or one that is in two splits.
    """
    if split.by == "component":
        return _by_component(index, split, where)
    if split.by == "folder":
        return _by_folder(index, split, known, where)
    if split.by == "hash":
        return lambda source, path, component: None
    names = _IndexedNames(index, known)
    table: dict[str, SplitName] = {}
    listed = _lists(split, where) if split.by == "file" else _columns(index, split, sources, where)
    for place, written, wanted in listed:
        found = names.find(written)
        if not found:
            close = names.near(written)
            raise UserError(
                f"{shortened(written, 200)!r} is not a picture of the index",
                where=place,
                hint=f"did you mean {close!r}?"
                if close
                else "name it by its path below the dataset's folder",
            )
        if table.setdefault(found, wanted) != wanted:
            raise UserError(
                f"{shortened(found, 200)!r} is in {table[found]} and in {wanted}",
                where=place,
                hint="leave it in one of them",
            )
    return lambda source, path, component: table.get(f"{source}/{path}")


def _by_component(index: ImageIndex, split: Split, where: str) -> SplitOf:
    table = {component: name for name in SPLITS for component in split[name]}
    for component in table:
        _check_known("component", component, index.components, f"{where}.{table[component]}")
    return lambda source, path, component: table.get(component)


def _by_folder(index: ImageIndex, split: Split, known: KnownFiles, where: str) -> SplitOf:
    wanted: dict[str, SplitName] = {}
    for name in SPLITS:
        for folder in split[name]:
            if wanted.setdefault(folder.strip("/"), name) != name:
                raise UserError(
                    f"the folder {folder!r} is in {wanted[folder.strip('/')]} and in {name}",
                    where=f"{where}.{name}",
                    hint="name it in one of them",
                )
    there = known.names or {f"{one.source}/{one.path}" for one in index}
    folders = {str(parent) for name in there for parent in PurePosixPath(name).parents}
    folders |= {folder.partition("/")[2] for folder in folders}
    for folder, name in wanted.items():
        _check_known(
            "folder", folder, sorted(folders - {"", "."})[:_LOOKED_THROUGH], f"{where}.{name}", folders
        )

    def place(source: str, path: str, component: str) -> SplitName | None:
        parents = [str(parent) for parent in PurePosixPath(path).parents]
        inside = [*parents, *(f"{source}/{parent}" if parent != "." else source for parent in parents)]
        found = {wanted[folder]: folder for folder in inside if folder in wanted}
        if len(found) > 1:
            (first, of_first), (second, of_second) = list(found.items())[:2]
            raise UserError(
                f"{source}/{path} is in {of_first!r} and in {of_second!r}: it would be in {first} and in {second}",
                where=f"{where}.{second}",
                hint="name folders that are not inside each other",
            )
        return next(iter(found), None)

    return place


def _check_known(
    what: str, name: str, known: Sequence[str], where: str, all_known: Iterable[str] | None = None
) -> None:
    if name not in (known if all_known is None else all_known):
        close = nearest(name, known)
        raise UserError(
            f"no picture of the index is in the {what} {name!r}",
            where=where,
            hint=f"did you mean {close!r}?" if close else f"there are: {shortened(', '.join(known), 300)}",
        )


def _lists(split: Split, where: str) -> Iterable[tuple[str, str, SplitName]]:
    """Place, name and split of every line of the lists."""
    for name in SPLITS:
        for path in split[name]:
            try:
                # Names may have what only some take for the end of a line, such as U+2028.
                lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"the list {path} cannot be read: {why(error) if isinstance(error, OSError) else error}",
                    where=f"{where}.{name}",
                    hint="give the path of a text file with one picture per line"
                    if isinstance(error, OSError)
                    else "save it as UTF-8",
                ) from error
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", line.strip(), name


def _columns(
    index: ImageIndex, split: Split, sources: Mapping[str, DataSource], where: str
) -> Iterable[tuple[str, str, SplitName]]:
    """Place, name and split of every row of the tables that has one of the values."""
    wanted = {value: name for name in SPLITS for value in split[name]}
    tables: list[tuple[str, Path]] = [("", split.table)] if split.table is not None else []
    for source in index.sources if split.table is None else []:
        given = sources.get(source)
        path = captions_path(given.captions, given.path) if given is not None and given.captions else None
        if path is None:
            raise UserError(
                f"dataset {source!r} has no captions file with a column {split.column!r}",
                where=f"{where}.column",
                hint="give the dataset `captions`, or the split a `table`",
            )
        tables.append((f"{source}/", path))
    met: Counter[str] = Counter()
    for prefix, path in tables:
        for line, written, value in read_column(path, split.column):
            met[value] += 1
            if value in wanted:
                yield f"{path}:{line}", f"{prefix}{written.removeprefix('./')}", wanted[value]
    for value, name in wanted.items():
        if value not in met:
            _check_known("rows of", value, sorted(met), f"{where}.{name}")


class _IndexedNames:
    """Files that the index knows, by what a list or a table may call them."""

    def __init__(self, index: ImageIndex, known: KnownFiles) -> None:
        full = known.names or {f"{one.source}/{one.path}" for one in index}
        self._by_name: dict[str, str] = {}
        twice: set[str] = set()
        for name in sorted(full):
            short = _form(name.partition("/")[2])
            twice |= {short} if self._by_name.setdefault(short, name) != name else set()
        # A path that two datasets have means neither.
        for short in twice:
            del self._by_name[short]
        self._by_name |= {_form(name): name for name in full}

    def find(self, written: str) -> str | None:
        """DATASET/path of the file that is meant, or None."""
        return self._by_name.get(_form(written))

    def near(self, written: str) -> str | None:
        """The file whose name is nearest, or None."""
        return nearest(_form(written), list(self._by_name)[:_LOOKED_THROUGH])


def _form(name: str) -> str:
    return PurePosixPath(unicodedata.normalize("NFC", name)).as_posix()
