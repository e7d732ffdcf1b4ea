"""Whether MLflow answers, within seconds and without importing it. Changes nothing there."""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import sqlite3
import urllib.error
import urllib.request
from http.client import BadStatusLine, HTTPException, LineTooLong
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator import disk
from orchestrator.fsio import open_regular
from orchestrator.tracking.connect import absolute_uri, database_path
from orchestrator.tracking.outage import Trouble
from orchestrator.tracking.outage import trouble as found_in

_SQLITE_MAGIC = b"SQLite format 3\0"
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
# What SQLAlchemy takes for a database if the address does not say it.
_DRIVERS = {"postgresql": "psycopg2", "mysql": "MySQLdb", "mssql": "pyodbc"}


def trouble(uri: str, timeout_s: float) -> Trouble | None:
    """Why records cannot be sent to `uri` now, or None if nothing speaks against it.

    Args:
        uri: a tracking address that :func:`absolute_uri` takes.
        timeout_s: how long to wait for an answer.
    """
    absolute = absolute_uri(uri)
    database = database_path(absolute)
    try:
        if database is not None:
            _signatures(database)
        elif absolute.startswith("http"):
            _query_server(absolute, timeout_s)
        else:
            _query_database(absolute, timeout_s)
    except (OSError, ImportError, sqlite3.Error, BadStatusLine, LineTooLong) as error:
        return found_in(absolute, error)
    except (HTTPException, ValueError) as error:
        # No host and no port can be made of it.
        return found_in(absolute, ConnectionError(str(error)))
    return None


def _signatures(path: Path) -> None:
    """Raises OSError or sqlite3.DatabaseError if a SQLite database cannot be made or used, as MLflow would."""
    try:
        with open_regular(path) as file:
            start = file.read(len(_SQLITE_MAGIC))
    except FileNotFoundError:
        _require_writable(disk.existing(path), folder=True)
        return
    if start not in (b"", _SQLITE_MAGIC):
        raise sqlite3.DatabaseError("file is not a database")
    # SQLite writes a journal beside the file.
    _require_writable(path)
    _require_writable(path.parent, folder=True)


def _require_writable(path: Path, *, folder: bool = False) -> None:
    if folder and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if not os.access(path, os.W_OK | os.X_OK if folder else os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _query_server(uri: str, timeout_s: float) -> None:
    """Any answer of an HTTP server will do, but for its own troubles: behind a proxy there may be no /health."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise ConnectionError(f"status {error.code}") from None


def _query_database(uri: str, timeout_s: float) -> None:
    parts = urlsplit(uri)
    scheme, _, driver = parts.scheme.partition("+")
    package = driver or _DRIVERS[scheme]
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(name=package)
    # Without a host it is a socket in the file system, or in the driver's own settings.
    if parts.hostname:
        socket.create_connection((parts.hostname, parts.port or _PORTS[scheme]), timeout=timeout_s).close()
