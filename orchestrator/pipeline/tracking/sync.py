"""`orchestrator sync`: what a server that was away did not get is sent, and how much it was is said."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.pipeline.tracking import tracking_run
from orchestrator.tracking.backlog import backlog, clock, counted, pending
from orchestrator.tracking.connect import database_path
from orchestrator.tracking.flusher import Counts
from orchestrator.tracking.run import PATIENCE_S
from orchestrator.tracking.spool import Spool

# Where there is no terminal, a line so often.
_LINE_S = 5.0
_POLL_S = 0.5
_SENDING = "sending tracking records"
_NOTHING = " Nothing waits: MLflow has all that was recorded."


def sync(console: Console, loaded: LoadedPipeline, patience: float = PATIENCE_S) -> bool:
    """Send what waits for MLflow; True if nothing waits any more.

    Args:
        console: where what was sent, and what still waits, is said.
        loaded: the pipeline, whose data need not be there.
        patience: seconds without an answer after which it gives up.

    Raises:
        UserError: a driver runs the pipeline, which sends what waits itself; or the store cannot be used.
    """
    workspace = Workspace(loaded.spec.store)
    if not workspace.exists():
        console.print(Text("✓", "green").append(_NOTHING, "default"), soft_wrap=True)
        return True
    with (
        workspace.drive(loaded.name, console.print),
        _Shown(
            console, Spool(workspace.spool(loaded.name)), database_path(loaded.spec.tracking.uri)
        ) as shown,
    ):
        counts, after = tracking_run.send(loaded, workspace, shown.watch, patience, shown.begin)
    lost = _lost(counts)
    if after is None:
        text = f" Sent {counted(counts.sent)} to {tracking_run.where(loaded)}{lost}; nothing waits."
        text = text if counts.sent or lost else _NOTHING
        mark = Text("!", "yellow") if lost else Text("✓", "green")
        console.print(mark.append(text, "default"), soft_wrap=True)
        return True
    text = f" Sent {counts.sent:,}{lost}; {after}"
    console.print(Text("✗", "red").append(text, "default"), soft_wrap=True)
    if after.outage is not None:
        console.print(Text(f"  hint {after.outage.trouble.cure}", "bright_black"), soft_wrap=True)
    return False


def _lost(counts: Counts) -> str:
    """Of records that will never be in MLflow, how many there were."""
    refused = f"; MLflow refused {counts.refused:,}" if counts.refused else ""
    unknown = f"; {counts.unknown:,} skipped, of a kind that this version does not know"
    unusable = f"; {counts.unusable:,} left out, whose content or files cannot be used"
    return refused + (unknown if counts.unknown else "") + (unusable if counts.unusable else "")


class _Shown:
    """How far the sending is: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, spool: Spool, database: Path | None = None) -> None:
        self._console, self._spool, self._database = console, spool, database
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(_SENDING, total=None, visible=False)
        self._polled_at = self._line = time.monotonic()
        self._bytes, self._what = 0, ""

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self) -> None:
        """The sending is about to begin. Records are counted now and not again: all of them have to be read for it."""
        self._bytes = pending(self._spool)
        if found := backlog(self._spool):
            self._what = f"{counted(found.records)}, the oldest of {clock(found.since)}"
        self._bar.update(self._task, total=self._bytes, visible=True)

    def watch(self) -> bool:
        """Called all the while; see :meth:`Flusher.drain`."""
        now = time.monotonic()
        if now - self._polled_at >= _POLL_S:
            self._polled_at = now
            self._show(self._bytes - pending(self._spool), now)
        return True

    def _show(self, sent: int, now: float) -> None:
        # It gets its name once it is whole.
        creates = self._database is not None and not self._database.exists()
        doing = f"creating the tracking database {self._database}" if creates else _SENDING
        self._bar.update(self._task, completed=sent, description=doing)
        if not self._console.is_terminal and now - self._line >= _LINE_S:
            self._line = now
            text = f"  {doing} for {self._what}"
            if not creates:
                text = f"  sent {sent / 1e6:,.1f} of {self._bytes / 1e6:,.1f} MB: {self._what}"
            self._console.print(Text(text), soft_wrap=True)
