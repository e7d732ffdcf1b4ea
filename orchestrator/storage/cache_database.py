"""Databases in this machine's cache: a help and never needed, so that one that cannot be used is done without."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator

from orchestrator.storage.cache_folder import cache_folder

logger = logging.getLogger("orchestrator")


@contextlib.contextmanager
def cache_database(file: str, schema: str, busy_s: float) -> Iterator[sqlite3.Connection]:
    """A database of the cache, made if it is not there.

    Args:
        file: its name in the cache folder.
        schema: what makes its tables where they are not there.
        busy_s: how long a writer of another process is waited for, in seconds.

    Raises:
        sqlite3.Error, OSError: there can be none, or it is damaged or busy.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / file, timeout=busy_s, isolation_level=None)
    try:
        # A loss of power costs what is made again, and a write in the middle costs nobody a wait for a disk.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(schema)
        yield connection
    finally:
        connection.close()


def set_aside(error: Exception, file: str, what: str) -> None:
    """Say why nothing is remembered; a database that is none is removed, so that the next run has one.

    Its journal goes, too: SQLite would play it back into the new one.

    Args:
        error: what using it raised.
        file: its name in the cache folder.
        what: is not remembered, with the verb, such as "digests of files are".
    """
    logger.debug("%s not remembered: %s", what, error)
    if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
        for end in ("", "-journal"):
            with contextlib.suppress(OSError):
                (cache_folder() / f"{file}{end}").unlink()
