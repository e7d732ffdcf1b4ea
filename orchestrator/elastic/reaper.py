"""Ends what a cluster leaves behind, however its driver ends: `python -P -S reaper.py FOLDER`, a process of its own.

A SIGKILL leaves the driver no time to end its cluster. Ray's raylet dies with it, but the raylet's agents hold each
other's pipes open and stay for a minute. This process waits for the end of its standard input, which is the end
of the driver however that comes about. Then it ends the cluster's processes and removes the cluster's folder.

A process belongs to the cluster if it was started with `ORCHESTRATOR_CLUSTER=FOLDER` in its environment, which
children inherit, or if one of its ancestors was. Ray's workers and agents write their titles over their
environment, so one of these that has lost its parent is known by its title and its files in the folder. Files
alone say nothing: a user may be reading a log.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "ORCHESTRATOR_CLUSTER"
_PATIENCE_S = 15.0


class Reaper:
    """The process that watches over the cluster in `folder`; started at once, ended by `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-S", __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True
        )

    @contextmanager
    def marking(self) -> Iterator[None]:
        """What this process starts meanwhile belongs to the cluster."""
        before = os.environ.get(MARK)
        os.environ[MARK] = str(self._folder)
        try:
            yield
        finally:
            del os.environ[MARK]
            if before is not None:
                os.environ[MARK] = before

    def close(self) -> None:
        """End all that belongs to the cluster, remove its folder, and wait until that is done."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main(folder: str) -> None:
    """Wait for the driver's end, then leave nothing of the cluster in `folder`."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + _PATIENCE_S
    while (pids := members(folder)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


def members(folder: str) -> list[int]:
    """Processes that belong to the cluster in `folder`; never this one or its parent, the driver."""
    parents = dict(_processes())
    mark = f"{MARK}={folder}".encode()
    found = {pid for pid in parents if mark in _environment(pid) or _is_rays(pid, folder)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid(), os.getppid()})


def _processes() -> Iterator[tuple[int, int]]:
    """Process ids with their parents'; the dead ones that nobody has waited for are left out."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            # The name in parentheses may hold anything; state and parent follow it.
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            yield int(process.name), int(parent)


def _is_rays(pid: int, folder: str) -> bool:
    """Whether this is a worker or an agent of Ray's with a file of the cluster's folder open."""
    process = Path("/proc") / str(pid)
    try:
        if not (process / "cmdline").read_bytes().startswith(b"ray::"):
            return False
        return any(str(link.readlink()).startswith(f"{folder}/") for link in (process / "fd").iterdir())
    except OSError:
        return False


def _environment(pid: int) -> list[bytes]:
    """What the process was started with; nothing of other users' processes."""
    try:
        return (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


if __name__ == "__main__":
    main(sys.argv[1])
