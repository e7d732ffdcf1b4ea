"""Clears up after a killed driver: `python -S reaper.py FOLDER`, started by `cluster.start`, a process of its own.

A SIGKILL leaves the driver no time to end its cluster. Ray's raylet dies with it, but the raylet's agents hold each
other's pipes open and stay for a minute. This process waits for the end of its standard input, which is the end
of the driver however that comes about, and then ends every process that has a file of the cluster's own folder
open, and removes the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

_PATIENCE_S = 15.0


def main(folder: str) -> None:
    """Wait for the driver's end, then leave nothing of the cluster in `folder`."""
    sys.stdin.buffer.read()
    deadline = time.monotonic() + _PATIENCE_S
    while (pids := _users(folder)) and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: str) -> list[int]:
    """Processes with a file below `folder` open, but for this one and the driver, if it lives: it only closed."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) in (os.getpid(), os.getppid()):
            continue
        try:
            opened = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(f"{folder}/") for name in opened):
            found.append(int(process.name))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
