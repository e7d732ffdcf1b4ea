"""Whether MLflow answers, within seconds and without importing it. Changes nothing there."""

from __future__ import annotations

import importlib.util
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import UserError
from orchestrator.redact import redacted
from orchestrator.tracking.connect import absolute_uri, database_path

WAITS = "start the server, or mend the address; until it answers, records wait in the store"
_SQLITE_MAGIC = b"SQLite format 3\0"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# What SQLAlchemy takes for a database if the address does not say it.
_DRIVERS = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}


def trouble(uri: str, timeout_s: float) -> UserError | None:
    """Why records cannot be sent to `uri` now, or None if nothing speaks against it.

    Args:
        uri: a tracking address that :func:`absolute_uri` takes.
        timeout_s: how long to wait for an answer.
    """
    absolute = absolute_uri(uri)
    database = database_path(absolute)
    if database is not None:
        return _file_trouble(database)
    if absolute.startswith("http"):
        return _server_trouble(absolute, timeout_s)
    return _database_trouble(absolute, timeout_s)


def _file_trouble(path: Path) -> UserError | None:
    if path.is_dir():
        return UserError(f"{path} is a folder", hint="name a file in it, such as mlflow.db")
    if not path.exists():
        existing = next(parent for parent in path.parents if parent.exists())
        if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
            return None
        return UserError(f"MLflow's database {path} cannot be made: {existing} cannot be written")
    try:
        with path.open("rb") as file:
            start = file.read(len(_SQLITE_MAGIC))
    except OSError as error:
        return UserError(f"MLflow's database {path} cannot be read: {error.strerror}")
    if start not in (b"", _SQLITE_MAGIC):
        hint = "put back a copy of the database, or name another file"
        return UserError(f"{path} is no SQLite database", hint=hint)
    # SQLite writes a journal beside the file.
    if os.access(path, os.W_OK) and os.access(path.parent, os.W_OK | os.X_OK):
        return None
    return UserError(f"MLflow's database {path} cannot be written", hint="allow it, or name another file")


def _server_trouble(uri: str, timeout_s: float) -> UserError | None:
    """Any answer of an HTTP server will do, but for its own troubles: behind a proxy there may be no /health."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s):
            return None
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return _away(uri, f"status {error.code}")
        return None
    except (OSError, ValueError) as error:
        return _away(uri, str(getattr(error, "reason", error)))


def _database_trouble(uri: str, timeout_s: float) -> UserError | None:
    parts = urlsplit(uri)
    scheme, _, driver = parts.scheme.partition("+")
    package = driver or _DRIVERS[scheme]
    if importlib.util.find_spec(package) is None:
        hint = f"install it, or name the driver that you have, as in {scheme}+DRIVER://…"
        return UserError(f"the database's driver {package} is not installed", hint=hint)
    # Without a host it is a socket in the file system, or in the driver's own settings.
    if not parts.hostname:
        return None
    try:
        with socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), timeout=timeout_s):
            return None
    except (OSError, ValueError) as error:
        return _away(uri, str(error))


def _away(uri: str, why: str) -> UserError:
    return UserError(
        redacted(f"MLflow at {uri} does not answer: {why}"),
        hint=WAITS,
    )
