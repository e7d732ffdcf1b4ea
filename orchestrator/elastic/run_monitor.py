"""What happens in a run, written down as it happens: progress, where the time goes, lines for the user.

It runs beside Ray Train's controller and knows nothing of Ray. What the driver has to do (record metrics, print a
line) leaves through `emit`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.elastic.time_accounting import Recovery, TimeAccounting
from orchestrator.progress import time_left

Event = dict[str, Any]

_LINE_EVERY_S = 10.0
_METRICS_EVERY_S = 5.0
ACCOUNT = "goodput.json"


@dataclass
class _Progress:
    """The newest metrics of worker 0, and when they came (monotonic)."""

    step: int = 0
    metrics: Mapping[str, float] | None = None
    at: float = 0.0
    step_s: float | None = None


class RunMonitor:
    """The account of one run.

    Args:
        name: of the job, for lines.
        num_steps: of the job.
        account: file that keeps the account over drivers.
        emit: takes events for the driver: `metrics`, `line`, `routine`, `log` and `record`.
    """

    def __init__(self, name: str, num_steps: int, account: Path, emit: Callable[[Event], None]) -> None:
        self.name, self.num_steps, self._file, self._emit = name, num_steps, account, emit
        self.goodput = TimeAccounting.load(account)
        self.workers = 0
        self._progress = _Progress(at=time.monotonic())
        self._recovery: Recovery | None = None
        self._group_stepped = False
        self._line_at = self._metrics_at = time.monotonic()
        self._unkept = False

    # --- what others ask --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps done, as last reported."""
        return self._progress.step

    def stalled_s(self, stall_timeout_s: float) -> float | None:
        """The seconds without any progress, if they are too many."""
        quiet = time.monotonic() - self._progress.at
        return quiet if quiet > max(stall_timeout_s, 10 * (self._progress.step_s or 0.0)) else None

    # --- what happens -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The run begins, or goes on under a new driver."""
        self.goodput.begin(time.time())

    def group_started(self, workers: int) -> None:
        """A worker group was chosen and starts."""
        now = time.time()
        self.goodput.enter("restart", now)
        if self._recovery is not None:
            self._recovery.decided = now
        self.workers, self._group_stepped = workers, False
        self._progress.at = time.monotonic()

    def group_ended(self, cause: str, *, planned: bool) -> None:
        """The group ended; `planned`: all its work is in a checkpoint."""
        now = time.time()
        last = now - (time.monotonic() - self._progress.at)
        self.goodput.ended(planned, now)
        self._recovery = Recovery(cause, planned, last, now)
        self._progress.step_s, self.workers = None, 0
        if not planned:
            self.line(cause)

    def waiting(self) -> None:
        """There are too few machines to go on."""
        self.goodput.enter("waiting", time.time())

    def phase(self, event: Event) -> None:
        """Worker 0, or another, has passed a part of its start."""
        self._progress.at = time.monotonic()
        if self._recovery is not None:
            self._recovery.marks[event["name"]] = event["time"]

    def stepped(self, event: Event) -> None:
        """A step is done."""
        now, step = time.time(), int(event["step"])
        metrics: dict[str, float] = event["metrics"]
        held_out: dict[str, float] = event["held_out"]
        self._emit({"kind": "metrics", "values": metrics, "step": step, "channel": "train"})
        if held_out:
            self.looked(step, held_out)
        first, self._group_stepped = not self._group_stepped, True
        if first:
            self.goodput.resumed(step - 1)
            self._recovered(step, now)
        seconds = metrics["step_seconds"]
        # The look at held-out photos is between this step and the next: its time is booked with this one's.
        self.goodput.stepped(step, seconds + held_out.get("seconds", 0.0), event["stall"], now)
        known = self._progress.step_s
        smooth = seconds if known is None else 0.7 * known + 0.3 * seconds
        self._progress = _Progress(step, metrics, time.monotonic(), smooth)
        if first:
            self.account()

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        """Figures of photos that are not trained on."""
        self._progress.at = time.monotonic()
        self._emit({"kind": "metrics", "values": held_out, "step": step, "channel": "val"})

    def saved(self, event: Event) -> None:
        """A checkpoint is committed."""
        self.goodput.saved(event["step"])
        self.account()
        self._emit(
            {"kind": "metrics", "values": event["metrics"], "step": event["step"], "channel": "checkpoint"}
        )

    def tick(self) -> None:
        """Say how things are, now and then."""
        now = time.monotonic()
        metrics = self._progress.metrics
        if now - self._line_at >= _LINE_EVERY_S and self.workers and metrics is not None:
            self._line_at = now
            left = (self.num_steps - self.step) * metrics["step_seconds"]
            self._emit(
                {
                    "kind": "routine",
                    "text": f"{self.name}: step {self.step}/{self.num_steps}, loss {metrics['loss']:.3f}, "
                    f"{metrics['step_seconds']:.2f} s a step, {time_left(left)}",
                }
            )
        if now - self._metrics_at >= _METRICS_EVERY_S:
            self._metrics_at = now
            self.account()

    def account(self, *, last: bool = False) -> None:
        """Record where the time went so far, and keep it for a later driver."""
        metrics = self.goodput.metrics(time.time())
        values = {**metrics, "workers": float(self.workers)}
        # By seconds, not by steps: while nothing is trained no step passes. There is one account for each second, and
        # the last counts, too, where there is one of its second already.
        step = int(metrics["seconds_total"]) + last
        self._emit({"kind": "metrics", "values": values, "step": step, "channel": "goodput"})
        try:
            self.goodput.save(self._file)
        except OSError as error:
            # A full disk costs the account, and the checkpoints, which say so themselves.
            if not self._unkept:
                self.log(
                    logging.WARNING,
                    f"its time account cannot be written since {time.strftime('%H:%M:%S')}: {error}; training "
                    "continues, and writing is retried",
                )
            self._unkept = True
        else:
            self._unkept = False
        if last:
            self.log(logging.INFO, self.goodput.described())

    def line(self, text: str) -> None:
        """A line for the user."""
        self._emit({"kind": "line", "text": f"{self.name}: {text}"})

    def log(self, level: int, text: str) -> None:
        """A record for the stage's log."""
        self._emit({"kind": "log", "level": level, "text": f"{self.name}: {text}"})

    def _recovered(self, step: int, now: float) -> None:
        recovery, self._recovery = self._recovery, None
        if recovery is None:
            return
        recovery.first_step, recovery.resumed_at, recovery.workers = now, step - 1, self.workers
        self.goodput.recoveries.append(recovery)
        took = now - recovery.detected
        self.line(f"goes on from step {step - 1} with {self.workers} workers after {took:.1f} s")
