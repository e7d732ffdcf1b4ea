"""`orchestrator sync`: what a server that was away did not get is sent, and how much it was is said."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from orchestrator.pipeline import tracked
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.workspace import Workspace
from orchestrator.tracking.backlog import Backlog, backlog, clock, counted
from orchestrator.tracking.runs import PATIENCE_S
from orchestrator.tracking.spool import Spool

# Where there is no terminal, a line so often.
_LINE_S = 5.0
_LOOK_S = 0.5
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
    with workspace.drive(loaded.name, console.print):
        # With a remote store, what other machines left is known once the sending has begun.
        before = tracked.waiting(loaded, workspace)
        with _Shown(console, Spool(workspace.spool(loaded.name))) as shown:
            after = tracked.send(loaded, workspace, shown.watch, patience)
    most = max(shown.most, *(found.backlog.records if found else 0 for found in (before, after)))
    done = most - (after.backlog.records if after else 0)
    if after is None:
        text = f" Sent {counted(done)} to {tracked.where(loaded)}; nothing waits." if done else _NOTHING
        console.print(Text("✓", "green").append(text, "default"), soft_wrap=True)
        return True
    text = f" Sent {done:,}; {after}"
    console.print(Text("✗", "red").append(text, "default"), soft_wrap=True)
    if after.outage is not None:
        console.print(Text(f"  hint {after.outage.trouble.cure}", "bright_black"), soft_wrap=True)
    return False


class _Shown:
    """How far the sending is: a bar on a terminal, lines elsewhere."""

    def __init__(self, console: Console, spool: Spool) -> None:
        self._console, self._spool = console, spool
        self._bar = Progress(
            TextColumn("  sending tracking records"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._looked = self._line = time.monotonic()
        self.most = 0

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def watch(self) -> bool:
        """Called all the while; see :meth:`Flusher.drain`."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_S or not self.most:
            self._looked = now
            if found := backlog(self._spool):
                self._show(found, now)
        return True

    def _show(self, found: Backlog, now: float) -> None:
        self.most = max(self.most, found.records)
        if self._task is None:
            self._task = self._bar.add_task("", total=self.most)
        self._bar.update(self._task, total=self.most, completed=self.most - found.records)
        if not self._console.is_terminal and now - self._line >= _LINE_S:
            self._line = now
            text = f"  sent {self.most - found.records:,} of {counted(self.most)}, the oldest of {clock(found.since)}"
            self._console.print(Text(text), soft_wrap=True)
