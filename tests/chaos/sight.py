"""What can be seen of a run from outside: its spool, its jobs' accounts, its processes."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from orchestrator.tracking.spool import Spool


class Sight:
    """Reads what a run leaves below `root`, its store's folder on this machine; only what is new each time.

    Attributes:
        root: that folder.
        times: when each step of a job was first recorded, in seconds since 1970, by job and step.
        accounts: the newest goodput account of each job.
        most_memory_files: the most that one process ever held.
    """

    def __init__(self, root: Path, pipeline: str) -> None:
        self.root = root
        self._spool = Spool(root / "spool" / pipeline)
        self._offsets: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self.times: dict[str, dict[int, float]] = defaultdict(dict)
        self.accounts: dict[str, dict[str, Any]] = {}
        self.most_memory_files = 0

    def look(self) -> None:
        """Take in what is new."""
        for run in self._spool.run_ids():
            for record, offset in self._spool.read(run, self._offsets.get(run, 0)):
                self._offsets[run] = offset
                if record["op"] == "open":
                    self._names[run] = record["name"]
                elif record["op"] == "metrics" and record["channel"] == "train":
                    self.times[self._names[run]].setdefault(int(record["step"]), record["time_ms"] / 1000)
        for path in self.root.glob("work/*/goodput.json"):
            with contextlib.suppress(OSError, ValueError):
                self.accounts[_job(path)] = json.loads(path.read_text())

    def steps(self) -> int:
        """Steps recorded so far, of all jobs together."""
        return sum(len(steps) for steps in self.times.values())

    def lost(self) -> int:
        """Steps lost so far, as the engine counts them."""
        return sum(int(account["counts"].get("steps_lost", 0)) for account in self.accounts.values())

    def recoveries(self) -> list[dict[str, Any]]:
        """Every way back that a controller has accounted for, in order."""
        found = [
            {**recovery, "job": job}
            for job, account in self.accounts.items()
            for recovery in account["recoveries"]
        ]
        return sorted(found, key=lambda recovery: float(recovery["detected"]))

    def first_step_after(self, moment: float) -> float | None:
        """When the first new step after `moment` was recorded."""
        later = [at for steps in self.times.values() for at in steps.values() if at > moment]
        return min(later, default=None)

    def count_memory_files(self, processes: list[psutil.Process]) -> None:
        """Look how many anonymous memory files each process holds, open or mapped."""
        for process in processes:
            with contextlib.suppress(OSError, psutil.Error):
                links = [str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                held = sum("memfd:block" in link for link in links) + maps.count("memfd:block")
                self.most_memory_files = max(self.most_memory_files, held)


def _job(path: Path) -> str:
    """The name of the job whose account this is: a stage's, or a student's."""
    student = path.with_name("student.json")
    if student.exists():
        return str(json.loads(student.read_text())["job"])
    return path.parent.name.partition("-")[0]


def actors(processes: list[psutil.Process], name: str) -> list[psutil.Process]:
    """Processes of a class of Ray actors."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if any(name in part for part in process.cmdline()):
                found.append(process)
    return found
