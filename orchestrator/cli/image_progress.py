"""How far a command is that goes through images: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from orchestrator.progress import time_left

_LINE_S = 5.0


class ImageProgress:
    """A context that is called with the number of images done, and of all; it shows nothing before the first call.

    The first call says how many an earlier run has done. Rate and time left are of those that came after.

    Attributes:
        seconds: from the first call to the last one.
    """

    def __init__(self, console: Console, doing: str = "embedding") -> None:
        self._console, self._doing = console, doing
        self._bar = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(doing, total=None, visible=False, rate="", left="")
        self.seconds = 0.0

    def __enter__(self) -> ImageProgress:
        self._began = self._line = time.monotonic()
        self._before: int | None = None
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._before is None:
            self._before, self._began = done, now
        self.seconds, own = max(now - self._began, 1e-9), done - self._before
        rate = f"{own / self.seconds:,.1f} images/s" if own else ""
        left = time_left(self.seconds * (total - done) / own) if own and done < total else ""
        self._bar.update(self._task, completed=done, total=total, rate=rate, left=left, visible=True)
        if not self._console.is_terminal and now - self._line >= _LINE_S and left:
            self._line = now
            line = f"  {self._doing}: {done:,} of {total:,} images, {rate}, {left}"
            self._console.print(Text(line), soft_wrap=True)
