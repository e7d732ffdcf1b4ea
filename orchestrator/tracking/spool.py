"""What a run has to tell MLflow, written down first: an append-only file of JSON lines a run.

A line is there once `append` returns, also if the process is killed; the flusher syncs it to disk before it
sends it. Several processes may write and read one spool on one file system.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

from orchestrator import fsio
from orchestrator.disk import described, is_full
from orchestrator.redact import redacted_values

Record = dict[str, Any]
_RUN_ID = re.compile(r"[A-Za-z0-9_\-]+")
_log = logging.getLogger(__name__)
_TELL_EVERY_S = 60.0
# Files whose damage this process has told, by whichever of its spools.
_DAMAGE_TOLD: set[Path] = set()
LATEST_S = 253_402_300_799
"""The end of the year 9999 in seconds since 1970: no clock shows a later time, and no date can be made of it."""
# Of these kinds of records, what they must have besides `op` and `time_ms`, and of what type.
_FIELDS: dict[str, dict[str, type | UnionType]] = {
    "open": {"name": str, "tags": dict | None},
    "params": {"params": dict},
    "tags": {"tags": dict},
    "metrics": {"channel": str, "step": int, "metrics": dict},
    "file": {"name": str, "copy": str},
    "datasets": {"datasets": list},
    "model": {
        "name": str,
        "kind": str,
        "folder": str | None,
        "texts": dict,
        "params": dict,
        "tags": dict,
        "metrics": dict,
        "step": int,
    },
    "finish": {"status": str},
}
_OF_A_DATASET = {"name": str, "digest": str, "uri": str, "profile": dict, "used_for": str}
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
        self._lost, self._tell_at = 0, 0.0
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
        """Records anything else about a run: `open`, `params`, `tags`, `file`, `datasets`, `model`, `finish`.

        Secrets are left out (`redact`).
        """
        with self._locked(run_id) as (fd, log):
            self._write(fd, log, {"op": op, **redacted_values(payload), "time_ms": now_ms()})

    @contextmanager
    def losses_logged(self) -> Iterator[None]:
        """A disk that takes no records costs these, not the training. That is told once a minute, with their number."""
        try:
            yield
        except OSError as error:
            self._lost += 1
            if time.monotonic() >= self._tell_at:
                self._tell_at = time.monotonic() + _TELL_EVERY_S
                why = described(error, [self.folder]) if is_full(error) else str(error)
                _log.warning(
                    "tracking records are lost until %s can be written again, %d so far at %s: %s; the run continues",
                    self.folder,
                    self._lost,
                    time.strftime("%H:%M:%S"),
                    why,
                )
        else:
            # Of a full disk a small record may find room now and then.
            if self._lost and time.monotonic() >= self._tell_at:
                _log.warning("tracking records are written again; lost: %d", self._lost)
                self._lost = 0

    def history(self, run_id: str, channel: str | None = None) -> list[Record]:
        """The run's metrics in the order of recording: dicts of step, time_ms, channel and metrics."""
        return [
            {name: record[name] for name in ("step", "time_ms", "channel", "metrics")}
            for record, _ in self.read(run_id)
            if record["op"] == "metrics" and channel in (None, record["channel"])
        ]

    def read(self, run_id: str, offset: int = 0) -> list[tuple[Record, int]]:
        """The records from byte `offset` on, each with the offset after it, without a line being written."""
        return self.read_all(run_id, offset)[0]

    def read_all(self, run_id: str, offset: int = 0) -> tuple[list[tuple[Record, int]], int]:
        """As :meth:`read`, and the offset after the last whole line, which need not be a record."""
        try:
            with fsio.open_regular(self.path(run_id)) as file:
                file.seek(offset)
                data = file.read()
        except (FileNotFoundError, fsio.NotAFileError, IsADirectoryError):
            return [], offset
        return list(_parse(data, offset, self._warn(run_id))), offset + data.rfind(b"\n") + 1

    def size(self, run_id: str) -> int:
        """Bytes recorded for the run; 0 if there is no such run."""
        try:
            return self.path(run_id).stat().st_size
        except FileNotFoundError:
            return 0

    def run_ids(self) -> list[str]:
        """Runs that have records."""
        return sorted(
            path.stem for path in self.folder.glob("*.jsonl") if is_run_id(path.stem) and path.is_file()
        )

    def open_children(self, run_id: str) -> list[str]:
        """Runs that were opened below `run_id` and have not ended since they were last opened."""
        found = []
        for other in self.run_ids():
            ops = [record for record, _ in self.read(other) if record["op"] in ("open", "finish")]
            if ops and ops[-1]["op"] == "open" and ops[-1].get("parent") == run_id:
                found.append(other)
        return found

    def children(self, run_id: str) -> dict[str, str]:
        """Runs that were opened below `run_id`, and their names."""
        found = {}
        for other in self.run_ids():
            # What opens a run is its first record: a long file need not be read for it.
            first = self._first(other)
            if first is not None and first["op"] == "open" and first.get("parent") == run_id:
                found[other] = str(first["name"])
        return found

    def _first(self, run_id: str) -> Record | None:
        try:
            with fsio.open_regular(self.path(run_id)) as file:
                return next((record for record, _ in _parse(file.readline(), 0, self._warn(run_id))), None)
        except (FileNotFoundError, fsio.NotAFileError, IsADirectoryError):
            return None

    def secure(self) -> bool:
        """Make what is recorded outlive this machine, if the folder does not; False if that is not possible now."""
        return self.keep is None or self.keep()

    def cut_torn_line(self, run_id: str) -> None:
        """Removes what follows the last whole line: its writer died. One who is writing is waited for."""
        with self._locked(run_id):
            pass

    def sync(self, run_id: str) -> None:
        """Makes what is recorded for the run survive a power cut."""
        fsio.sync(self.path(run_id))

    def path(self, run_id: str) -> Path:
        """The run's file."""
        if not is_run_id(run_id):
            raise ValueError(f"not a run id: {run_id!r}")
        return self.folder / f"{run_id}.jsonl"

    def files(self, run_id: str) -> Path:
        """Where copies of the run's files wait to be uploaded."""
        return self.path(run_id).with_suffix(".files")

    def _warn(self, run_id: str) -> Callable[[int], None]:
        """Says once a process that lines of a run's file are passed over."""

        def warn(offset: int) -> None:
            path = self.path(run_id)
            if path not in _DAMAGE_TOLD:
                _DAMAGE_TOLD.add(path)
                _log.warning(
                    "%s is damaged before byte %d: lines that are not records are skipped", path, offset
                )

        return warn

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
        for record, _ in _parse(data[:whole], 0, lambda offset: None):
            if record["op"] == "metrics":
                log.seen.add((record["channel"], record["step"]))
        log.offset += whole

    def _write(self, fd: int, log: _Log, record: Record) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = os.write(fd, line)
        if written < len(line):
            os.ftruncate(fd, log.offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log.offset += written
        if record["op"] == "metrics":
            log.seen.add((record["channel"], record["step"]))


def is_run_id(text: object) -> bool:
    """Whether it can be the id of one of our runs, and so part of a file's name."""
    return isinstance(text, str) and _RUN_ID.fullmatch(text) is not None


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def clean_name(name: str) -> str:
    """`name` with what MLflow refuses in names replaced by underscores, at most 250 characters."""
    return _NOT_IN_A_NAME.sub("_", name)[:250]


def _parse(data: bytes, offset: int, warn: Callable[[int], None]) -> Iterator[tuple[Record, int]]:
    # By newlines alone: other ends of lines may stand in a damaged one.
    for line in data.split(b"\n")[:-1]:
        offset += len(line) + 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # a damaged sector costs its own lines, not the run's history
            record = None
        if _is_record(record):
            yield record, offset
        else:
            warn(offset)


def _is_record(record: object) -> bool:
    """Whether it can be used. Kinds and fields of later versions are not damage."""
    if not isinstance(record, dict) or not isinstance(record.get("op"), str):
        return False
    if not _has(record, _FIELDS.get(record["op"], {}) | {"time_ms": int}):
        return False
    if not 0 <= record["time_ms"] <= 1000 * LATEST_S:
        return False
    match record["op"]:
        case "metrics" | "model":
            return all(isinstance(one, int | float) for one in record["metrics"].values())
        case "datasets":
            return all(_has(one, _OF_A_DATASET) for one in record["datasets"])
    return True


def _has(record: object, fields: Mapping[str, type | UnionType]) -> bool:
    return isinstance(record, dict) and all(
        isinstance(record.get(name), kind) for name, kind in fields.items()
    )
