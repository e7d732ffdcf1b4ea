"""A store: all objects of a pipeline in one SQLite file that its machines share, `store: sqlite:///srv/runs.db`."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import orchestrator


class SqliteStore(orchestrator.CachedStore):
    def __init__(self, uri: str) -> None:
        self._path = Path(uri.partition("://")[2]).absolute()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(f"sqlite://{self._path}")  # what workers open: they run in other folders

    def put_bytes(self, name: str, data: bytes) -> None:
        self._do("INSERT OR REPLACE INTO objects VALUES (:name, :data, strftime('%s', 'now'))", name, data)

    def get_bytes(self, name: str) -> bytes:
        for row in self._do("SELECT data FROM objects WHERE name = :name", name):
            return bytes(row["data"])
        raise FileNotFoundError(name)

    def list(self, prefix: str = "") -> Iterator[str]:
        rows = self._do("SELECT name FROM objects ORDER BY name")
        return (row["name"] for row in rows if row["name"].startswith(prefix))

    def delete(self, name: str) -> None:
        self._do("DELETE FROM objects WHERE name = :name", name)

    def stat(self, name: str) -> orchestrator.Stat | None:
        rows = self._do("SELECT length(data), at FROM objects WHERE name = :name", name)
        return orchestrator.Stat(*rows[0]) if rows else None

    def _do(self, sql: str, name: str = "-", data: bytes = b"") -> Sequence[sqlite3.Row]:
        with closing(sqlite3.connect(self._path, timeout=60)) as database, database:  # one transaction
            database.row_factory = sqlite3.Row
            database.execute("CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, data BLOB, at REAL)")
            return database.execute(sql, {"name": orchestrator.checked_name(name), "data": data}).fetchall()
