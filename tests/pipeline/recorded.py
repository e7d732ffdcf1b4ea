"""A tracking run that writes what happens to it to a file, in place of a tracking server."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.tracking.run import NullRun, Status

FILE = Path("tracking.jsonl")


class RecordedRun(NullRun):
    uri: ClassVar[str | None] = None

    def __init__(self, name: str, run_id: str, parent: str | None) -> None:
        super().__init__()
        self.run_id = run_id
        self.tracking_uri = RecordedRun.uri
        self._write(op="open", name=name, parent=parent)

    def child(self, name: str, resume_id: str | None = None) -> RecordedRun:
        return RecordedRun(name, resume_id or uuid.uuid4().hex, self.run_id)

    def metrics(self, values: Mapping[str, float], step: int, channel: str = "train") -> bool:
        self._write(op="metrics", channel=channel, step=step)
        return super().metrics(values, step, channel)

    def finish(self, status: Status) -> None:
        self._write(op="finish", status=status)

    def _write(self, **record: Any) -> None:
        line = json.dumps({"run": self.run_id, **record}) + "\n"
        descriptor = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)


@contextlib.contextmanager
def open_recorded(
    loaded: LoadedPipeline, workspace: Workspace, run_id: str, **_: object
) -> Iterator[RecordedRun]:
    RecordedRun.uri = loaded.spec.tracking.uri
    yield RecordedRun(loaded.name, run_id, None)


def runs() -> dict[str, dict[str, Any]]:
    """By run id: its name, how often it was opened, and its last status."""
    found: dict[str, dict[str, Any]] = {}
    for line in FILE.read_text().splitlines():
        record = json.loads(line)
        run = found.setdefault(record["run"], {"name": record.get("name"), "opened": 0, "status": None})
        if record["op"] == "open":
            run["opened"] += 1
            run["status"] = "RUNNING"
        elif record["op"] == "finish":
            run["status"] = record["status"]
    return found


def by_name(name: str) -> list[dict[str, Any]]:
    """The runs of that name, oldest first."""
    return [run for run in runs().values() if run["name"] == name]
