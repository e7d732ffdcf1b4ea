"""How far work is: a bar on a terminal, and a line in the log now and then.

Whoever works reports; the console draws (`pipeline/console.py`). Reports are log records below INFO, so that nobody
who does not ask for them sees or pays for them.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from orchestrator.units import duration

BARS = logging.getLogger("orchestrator.progress")
# What a log record has if a bar shows the same: a terminal leaves its line out.
ROUTINE = {"routine": True}

_BAR_EVERY_S = 0.25
_LINE_EVERY_S = 10.0


@dataclass(frozen=True)
class Progress:
    """How far something is.

    Attributes:
        name: what is worked on: a stage, or stage/student.
        done: of `total`.
        total: units of work in all, at least 1.
        detail: what else there is to say, such as the loss; may be empty.
        left_s: the seconds that it will take from here; None if that is not known yet.
    """

    name: str
    done: int
    total: int
    detail: str = ""
    left_s: float | None = None


def report(progress: Progress) -> None:
    """Show how far something is, if anybody looks."""
    BARS.debug("%s: %d of %d", progress.name, progress.done, progress.total, extra={"progress": progress})


class Meter:
    """Counts work of a known size, by any number of threads, and reports it at a bearable rate.

    Args:
        name: of the stage.
        total: units of work in all.
        what: the units and what is done to them: `photos read`.
    """

    def __init__(self, name: str, total: int, what: str) -> None:
        self._name, self._total, self._what = name, max(1, total), what
        self._done = self._before = 0
        self._began = self._line_at = time.monotonic()
        self._bar_at = 0.0
        self._lock = threading.Lock()

    def begin_at(self, count: int) -> None:
        """So many were done before: they count as done, and say nothing of how fast it goes."""
        with self._lock:
            self._before += count
        self.add(count)

    def add(self, count: int = 1, detail: str = "") -> None:
        """So many more are done.

        Args:
            count: of the units.
            detail: what is worked on now.
        """
        with self._lock:
            self._done = min(self._done + count, self._total)
            now = time.monotonic()
            draws = now - self._bar_at >= _BAR_EVERY_S or self._done == self._total
            says = now - self._line_at >= _LINE_EVERY_S
            self._bar_at = now if draws else self._bar_at
            self._line_at = now if says else self._line_at
            done, left_s = self._done, None
            if own := self._done - self._before:
                left_s = (now - self._began) * (self._total - self._done) / own
        if draws:
            report(Progress(self._name, done, self._total, detail or self._what, left_s))
        if says and left_s is not None:
            logging.getLogger("orchestrator").info(
                "%s: %s of %s %s, %s",
                self._name, f"{done:,}", f"{self._total:,}", self._what, time_left(left_s), extra=ROUTINE,
            )  # fmt: skip


def time_left(seconds: float) -> str:
    """`3m05s left`: on bars and in the log alike."""
    return f"{duration(seconds)} left"
