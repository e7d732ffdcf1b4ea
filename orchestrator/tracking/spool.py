"""What a run has to tell MLflow, written down first: an append-only file of JSON lines a run.

A line is there once `append` returns, also if the process is killed; the flusher syncs it to disk before it
sends it. Several processes may write and read one spool on one file system.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.redact import redacted_values

Record = dict[str, Any]
_RUN_ID = re.compile(r"[A-Za-z0-9_\-]+")
# MLflow 3 takes these in the names of metrics, params and tags; one bad name would hold up a whole batch.
_NOT_IN_A_NAME = re.compile(r"[^\w\-. :/]", re.ASCII)


@dataclass
class _Log:
    """How far this process has read a run's file, and which steps it saw there."""

    offset: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)


class Spool:
    """The records of all runs of a pipeline, in `folder`.

    Attributes:
        keep: copies the records to where they outlive this machine, and says whether that went well; None if they
            are there already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.keep: Callable[[], bool] | None = None
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Spool], tuple[Path]]:
        return Spool, (self.folder,)

    def append(
        self,
        run_id: str,
        step: int,
        metrics: Mapping[str, float],
        time_ms: int | None = None,
        channel: str = "train",
    ) -> bool:
        """Records the metrics of a step, or returns False if this run, channel and step are recorded already.

        A step that is replayed after a crash is thus counted once, with the values it had first. All metrics
        of a channel's step go into one call.
        """
        values = {clean_name(name): float(value) for name, value in metrics.items()}
        with self._locked(run_id) as (fd, log):
            if (channel, step) in log.seen:
                return False
            record = {"op": "metrics", "channel": channel, "step": step, "metrics": values}
            self._write(fd, log, {**record, "time_ms": now_ms() if time_ms is None else time_ms})
        return True

    def post(self, run_id: str, op: str, **payload: Any) -> None:
        """Records anything else about a run, `open`, `params`, `tags`, `file` or `finish`; no secrets (`redact`)."""
        with self._locked(run_id) as (fd, log):
            self._write(fd, log, {"op": op, **redacted_values(payload), "time_ms": now_ms()})

    def history(self, run_id: str, channel: str | None = None) -> list[Record]:
        """The run's metrics in the order of recording: dicts of step, time_ms, channel and metrics."""
        return [
            {name: record[name] for name in ("step", "time_ms", "channel", "metrics")}
            for record, _ in self.read(run_id)
            if record["op"] == "metrics" and channel in (None, record["channel"])
        ]

    def read(self, run_id: str, offset: int = 0) -> list[tuple[Record, int]]:
        """The records from byte `offset` on, each with the offset after it, without a line being written."""
        try:
            with self.path(run_id).open("rb") as file:
                file.seek(offset)
                return list(_parse(file.read(), offset))
        except FileNotFoundError:
            return []

    def size(self, run_id: str) -> int:
        """Bytes recorded for the run; 0 if there is no such run."""
        try:
            return self.path(run_id).stat().st_size
        except FileNotFoundError:
            return 0

    def run_ids(self) -> list[str]:
        """Runs that have records."""
        return sorted(path.stem for path in self.folder.glob("*.jsonl"))

    def open_children(self, run_id: str) -> list[str]:
        """Runs that were opened below `run_id` and have not ended since they were last opened."""
        found = []
        for other in self.run_ids():
            ops = [record for record, _ in self.read(other) if record["op"] in ("open", "finish")]
            if ops and ops[-1]["op"] == "open" and ops[-1].get("parent") == run_id:
                found.append(other)
        return found

    def children(self, run_id: str) -> list[str]:
        """Runs that were opened below `run_id`."""
        found = []
        for other in self.run_ids():
            if any(
                record.get("parent") == run_id for record, _ in self.read(other) if record["op"] == "open"
            ):
                found.append(other)
        return found

    def secure(self) -> bool:
        """Make what is recorded outlive this machine, if the folder does not; False if that is not possible now."""
        return self.keep is None or self.keep()

    def sync(self, run_id: str) -> None:
        """Makes what is recorded for the run survive a power cut."""
        fd = os.open(self.path(run_id), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def path(self, run_id: str) -> Path:
        """The run's file."""
        if not _RUN_ID.fullmatch(run_id):
            raise ValueError(f"not a run id: {run_id!r}")
        return self.folder / f"{run_id}.jsonl"

    def files(self, run_id: str) -> Path:
        """Where copies of the run's files wait to be uploaded."""
        return self.path(run_id).with_suffix(".files")

    @contextmanager
    def _locked(self, run_id: str) -> Iterator[tuple[int, _Log]]:
        path = self.path(run_id)
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                # A worker that was given up for dead may still write while its successor does.
                fcntl.flock(fd, fcntl.LOCK_EX)
                log = self._logs.setdefault(run_id, _Log())
                self._catch_up(fd, log)
                yield fd, log
            finally:
                os.close(fd)

    def _catch_up(self, fd: int, log: _Log) -> None:
        """Reads what others wrote; cuts off a line whose writer died in the middle of it."""
        size = os.fstat(fd).st_size
        if size < log.offset:
            log.offset, log.seen = 0, set()
        data = os.pread(fd, size - log.offset, log.offset)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(fd, log.offset + whole)
        for record, _ in _parse(data[:whole], 0):
            if record["op"] == "metrics":
                log.seen.add((record["channel"], record["step"]))
        log.offset += whole

    def _write(self, fd: int, log: _Log, record: Record) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = os.write(fd, line)
        if written < len(line):
            os.ftruncate(fd, log.offset)
            raise OSError(f"no room for a record in {self.folder}")
        log.offset += written
        if record["op"] == "metrics":
            log.seen.add((record["channel"], record["step"]))


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def clean_name(name: str) -> str:
    """`name` with what MLflow refuses in names replaced by underscores, at most 250 characters."""
    return _NOT_IN_A_NAME.sub("_", name)[:250]


def _parse(data: bytes, offset: int) -> Iterator[tuple[Record, int]]:
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        try:
            record = json.loads(line)
        except ValueError:  # a damaged sector costs its own lines, not the run's history
            continue
        if isinstance(record, dict) and "op" in record:
            yield record, offset
