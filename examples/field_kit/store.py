"""A store: all objects of a pipeline in one SQLite file, `store: sqlite:///srv/runs.db`."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import orchestrator

_TABLE = "CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, data BLOB, at REAL)"


class SqliteStore(orchestrator.CachedStore):
    """For machines that share the file."""

    def __init__(self, uri: str) -> None:
        self._path = Path(uri.partition("://")[2]).absolute()
        super().__init__(f"sqlite://{self._path}")  # what workers open: they run in other folders

    def put_bytes(self, name: str, data: bytes) -> None:
        """A transaction is atomic, also after a crash."""
        row = (orchestrator.checked_name(name), data, time.time())
        self._do("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", *row)

    def get_bytes(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is no such object."""
        rows = self._do("SELECT data FROM objects WHERE name = ?", orchestrator.checked_name(name))
        if not rows:
            raise FileNotFoundError(name)
        return bytes(rows[0][0])

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that start with the prefix, sorted."""
        rows = self._do("SELECT name FROM objects WHERE substr(name, 1, ?) = ?", len(prefix), prefix)
        return iter(sorted(name for (name,) in rows))

    def delete(self, name: str) -> None:
        """Fine if there is none."""
        self._do("DELETE FROM objects WHERE name = ?", orchestrator.checked_name(name))

    def stat(self, name: str) -> orchestrator.Stat | None:
        """Size and time."""
        rows = self._do(
            "SELECT length(data), at FROM objects WHERE name = ?", orchestrator.checked_name(name)
        )
        return orchestrator.Stat(*rows[0]) if rows else None

    def _do(self, statement: str, *values: object) -> Sequence[tuple[Any, ...]]:
        if not self._path.exists() and not statement.startswith("INSERT"):
            return []  # to look changes nothing
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=60)) as database, database:
            database.execute(_TABLE)
            return database.execute(statement, values).fetchall()
