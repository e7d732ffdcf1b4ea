"""MLflow's database after the store was copied or moved: the places of files in it are mended.

MLflow writes the absolute address of every run's and model's files into its database, and has no way to change one. A
database beside a copy of the store would send readers and writers to the old place for ever.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

FOLDER = "mlartifacts"
# Tables and columns of MLflow 3 that hold such addresses.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_WAIT_S = 10.0
_log = logging.getLogger(__name__)


def root_of(address: str) -> str | None:
    """An address up to and with its `mlartifacts` folder; None if there is none in it."""
    head, separator, _ = f"{address}/".rpartition(f"/{FOLDER}/")
    return f"{head}/{FOLDER}" if separator else None


def rebased(address: str, root: str) -> str:
    """The address of a file below some `mlartifacts` folder as it is below the folder `root`; others stay."""
    old = root_of(address)
    return address if old is None else root.rstrip("/") + address[len(old) :]


def mend_local(database: Path, root: Path) -> int:
    """Have addresses of local files lead below the folder `root`, if it is there and the files are in it.

    Args:
        database: of SQLite.
        root: the `mlartifacts` folder beside it.

    Returns:
        How many led elsewhere.
    """
    if not root.is_dir():
        return 0
    new = root.as_uri()

    def moved(addresses: Iterable[str]) -> set[str]:
        below: dict[str, list[str]] = {}
        for address in addresses:
            old = root_of(address)
            if old is not None and old != new and address.startswith("file:///"):
                below.setdefault(old, []).append(address)
        return {old for old, ones in below.items() if is_here(old, ones)}

    def is_here(old: str, addresses: list[str]) -> bool:
        files = [address for address in addresses if address != old]
        # Where nothing is in either place, the old one may be a disk that is away: what is changed stays changed.
        return not files or any(_exists(rebased(address, new)) for address in files)

    return _mend(database, new, moved)


def mend_remote(database: Path, experiment: str, root: str, is_copy: Callable[[], bool]) -> int:
    """Have addresses below the root of the experiment lead below `root`, such as `s3://bucket/prefix/mlartifacts`.

    Args:
        database: of SQLite.
        experiment: its name.
        root: where the files of the store's runs are now.
        is_copy: whether there are any.

    Returns:
        How many led elsewhere.
    """

    def moved(addresses: Iterable[str]) -> set[str]:
        roots = {root_of(address) for address in addresses} - {None, root}
        return {old for old in roots if old is not None and is_copy()}

    return _mend(database, root, moved, experiment)


def _exists(address: str) -> bool:
    return Path(unquote(urlsplit(address).path)).exists()


def _mend(
    database: Path, new: str, moved: Callable[[Iterable[str]], set[str]], experiment: str | None = None
) -> int:
    if not database.is_file():
        return 0
    roots: set[str] = set()
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=_WAIT_S)) as connection:
            columns = _known(connection)
            roots = moved(_addresses(connection, columns, experiment))
            with connection:
                count = sum(_replace(connection, columns, old, new) for old in roots)
    except sqlite3.Error as error:
        # Of a database that cannot be read MLflow, which opens it next, says what is wrong with it.
        level = logging.WARNING if roots else logging.DEBUG
        _log.log(
            level, "files of runs are read from their old place: %s cannot be updated: %s", database, error
        )
        return 0
    if count:
        _log.warning("the store was moved: in %s the files of runs and models are now in %s", database, new)
    return count


def _addresses(
    connection: sqlite3.Connection, columns: list[tuple[str, str]], experiment: str | None
) -> list[str]:
    """All addresses, or that of one experiment."""
    if experiment is not None:
        query = "SELECT artifact_location FROM experiments WHERE name = ?"
        return [str(address) for (address,) in connection.execute(query, (experiment,))]
    found: set[str] = set()
    for table, column in columns:
        query = f"SELECT DISTINCT {column} FROM {table} WHERE {column} IS NOT NULL"
        found.update(str(address) for (address,) in connection.execute(query))
    return sorted(found)


def _replace(connection: sqlite3.Connection, columns: list[tuple[str, str]], old: str, new: str) -> int:
    count = 0
    for table, column in columns:
        changed = connection.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
            f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
        )
        count += changed.rowcount
    return count


def _known(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Those of the columns that this database has."""
    names = {
        table: {str(row[1]) for row in connection.execute(f"PRAGMA table_info({table})")}
        for table in {table for table, _ in _COLUMNS}
    }
    return [(table, column) for table, column in _COLUMNS if column in names[table]]
