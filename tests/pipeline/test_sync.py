"""How far the sending of tracking records is, while it goes on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.pipeline.tracking import sync
from orchestrator.tracking.backlog import Backlog, backlog
from orchestrator.tracking.spool import Spool


@pytest.mark.parametrize("terminal", [False, True])
def test_records_are_counted_once_and_bytes_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """Counting reads all that waits, in the process that sends it."""
    spool = Spool(tmp_path)
    spool.post("run", "open", name="toy", tags=None)
    for _ in range(3):
        spool.post("run", "tags", tags={"text": "a" * 500_000})
    counts: list[Backlog | None] = []

    def count(spool: Spool) -> Backlog | None:
        counts.append(backlog(spool))
        return counts[-1]

    monkeypatch.setattr(sync, "backlog", count)
    monkeypatch.setattr(sync, "_POLL_S", 0.0)
    monkeypatch.setattr(sync, "_LINE_S", 0.0)
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
    offsets = [end for _, end in spool.read("run")]
    with sync._Shown(console, spool) as shown:
        shown.begin()
        for end in offsets:
            spool.path("run").with_suffix(".progress").write_text(json.dumps({"offset": end}))
            assert shown.watch()
            shown._bar.refresh()
    assert [found and found.records for found in counts] == [4]
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert ("1.0/1.5 MB" if terminal else "  sent 1.0 of 1.5 MB: 4 tracking records, the oldest of ") in said
    assert ("1.5/1.5 MB" if terminal else "  sent 1.5 of 1.5 MB: ") in said


@pytest.mark.parametrize("terminal", [False, True])
def test_a_database_that_is_being_created_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr(sync, "_POLL_S", 0.0)
    monkeypatch.setattr(sync, "_LINE_S", 0.0)
    spool, database = Spool(tmp_path / "spool"), tmp_path / "[new].db"
    spool.post("run", "open", name="toy", tags=None)
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with sync._Shown(console, spool, database) as shown:
        shown.begin()
        shown.watch()
        shown._bar.refresh()
        assert isinstance(console.file, io.StringIO)
        said = console.file.getvalue()
        assert f"  creating the tracking database {database}" in said
        assert "  sent " not in said
        database.touch()
        shown.watch()
        shown._bar.refresh()
    assert ("sending tracking records" if terminal else "  sent 0.0 of 0.0 MB: ") in console.file.getvalue()[
        len(said) :
    ]
