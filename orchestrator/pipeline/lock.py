"""Exclusive holds on a folder that the kernel lets go of when the holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from orchestrator.errors import UserError


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold `path` (a file, made if missing) for this process alone.

    Args:
        path: the lock file; it says who holds it.
        what: what is being held, for the message to the one who comes second.

    Raises:
        UserError: another process holds it; the message names it and says since when.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write to the store: {error.strerror}", where=str(path)) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path, what) from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a living process holds `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _held(path: Path, what: str) -> UserError:
    try:
        holder = json.loads(path.read_text())
        since = datetime.fromtimestamp(holder["since"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        who = f"process {holder['pid']} on {holder['host']} since {since}"
    except (OSError, ValueError, KeyError):
        who = "another process"
    return UserError(
        f"{what} is already being run by {who}",
        where=str(path),
        hint="wait for it, or stop it with Ctrl-C in its terminal",
    )
