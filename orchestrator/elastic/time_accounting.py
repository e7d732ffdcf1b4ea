"""Where a job's time went: every second since it started belongs to exactly one cause."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.fsio import atomic_write, open_regular

logger = logging.getLogger("orchestrator")

State = Literal["startup", "training", "restart", "waiting"]

# Causes of time that trained nothing, and events, as a sentence names them.
_SPENT = {
    "startup": "startup",
    "restart": "restarts",
    "waiting": "waiting",
    "lost": "lost",
    "checkpoint": "checkpoints",
}
_COUNTED = {
    "preemptions": "preemptions",
    "failures": "failures",
    "resizes": "resizes",
    "steps_lost": "lost steps",
}
_SHOWN_S = 0.05


@dataclass
class Recovery:
    """One loss of a group and the way back, in seconds since 1970.

    Attributes:
        cause: what was lost, or why the group was asked to yield.
        planned: the group had time to checkpoint.
        last_step: when the last step before it was reported.
        detected: when the controller knew.
        decided: when the new group was chosen.
        marks: when worker 0 of the new group passed each phase: joined, built, restored.
        first_step: when the first new step was done.
        resumed_at: the step it went on from.
        workers: of the new group.
    """

    cause: str
    planned: bool
    last_step: float
    detected: float
    decided: float = 0.0
    marks: dict[str, float] = field(default_factory=dict)
    first_step: float = 0.0
    resumed_at: int = 0
    workers: int = 0


@dataclass
class TimeAccounting:
    """The account of one job, over all its groups and drivers.

    `stopped` says that the user stopped the job, so that the time until it goes on is nobody's loss.

    A step's seconds are useful until the step is lost: then they move to `lost`. What a checkpoint held up counts
    as `checkpoint`; from the end of a group to the end of the next one's first step is `restart`, less the time
    without enough machines, which is `waiting`; what comes before the very first step is `startup`.
    """

    useful: float = 0.0
    startup: float = 0.0
    restart: float = 0.0
    waiting: float = 0.0
    lost: float = 0.0
    checkpoint: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    recoveries: list[Recovery] = field(default_factory=list)
    state: State = "startup"
    step: int = 0
    stopped: bool = False
    _since: float = 0.0
    _recent: dict[int, float] = field(default_factory=dict)

    def begin(self, now: float) -> None:
        """Start the clock, or start it again: time without a driver is lost too, unless the user stopped the job."""
        if self.total:
            self.state = "restart"
            if not self.stopped:
                self._accrue(now)
        self.stopped = False
        self._since = now

    def enter(self, state: State, now: float) -> None:
        """Book the time so far, and go on in `state`. Before the first step a restart is start-up, too."""
        self._accrue(now)
        self.state = "startup" if state == "restart" and not self.useful else state

    def stepped(self, step: int, step_s: float, stall_s: float, now: float) -> None:
        """A step is done that took `step_s`; `stall_s` of the time since the last one went into a checkpoint."""
        if self.state != "training":
            # The first step of a group ends its start, and is not part of it.
            self.enter("training", max(self._since, now - step_s))
        elapsed = now - self._since
        stall_s = min(stall_s, elapsed)
        self.checkpoint += stall_s
        seconds = elapsed - stall_s
        self.useful += seconds
        self._since = now
        self.step = step
        self._recent[step] = seconds

    def ended(self, planned: bool, now: float) -> None:
        """The group is gone; with a plan it spent its last seconds on a checkpoint, without one on a lost step."""
        if self.state == "training":
            elapsed = max(0.0, now - self._since)
            self._since = now
            if planned:
                self.checkpoint += elapsed
            else:
                self.lost += elapsed
        self.enter("restart", now)

    def saved(self, step: int) -> None:
        """Steps up to `step` are safe."""
        self._recent = {done: seconds for done, seconds in self._recent.items() if done > step}

    def resumed(self, step: int) -> None:
        """The new group goes on from `step`: what was done past it is lost."""
        seconds = sum(seconds for done, seconds in self._recent.items() if done > step)
        steps = sum(done > step for done in self._recent)
        self.useful -= seconds
        self.lost += seconds
        self.count("steps_lost", steps)
        self._recent, self.step = {}, step

    def count(self, what: str, number: int = 1) -> None:
        """Count an event."""
        self.counts[what] = self.counts.get(what, 0) + number

    @property
    def total(self) -> float:
        """All seconds booked so far."""
        return self.useful + self.startup + self.restart + self.waiting + self.lost + self.checkpoint

    def metrics(self, now: float | None = None) -> dict[str, float]:
        """For MLflow and the summary; with `now` the time up to then is in it."""
        if now is not None and self.state == "training":
            # Whether it was of use will be known at the step's end.
            running = replace(self, useful=self.useful + max(0.0, now - self._since))
            return running.metrics()
        if now is not None:
            self._accrue(now)
        seconds = {
            name: getattr(self, name)
            for name in ("useful", "startup", "restart", "waiting", "lost", "checkpoint")
        }
        counts = Counter(self.counts)
        return {
            "goodput": self.useful / self.total if self.total else 0.0,
            "seconds_total": self.total,
            **{f"seconds_{name}": value for name, value in seconds.items()},
            **{
                name: float(counts[name])
                for name in ("preemptions", "restarts", "resizes", "failures", "steps_lost")
            },
        }

    def described(self) -> str:
        """The account in a sentence, without what did not happen: `86 % of 38.5 s trained; 5.2 s startup`."""
        seconds = [
            f"{getattr(self, name):.1f} s {words}"
            for name, words in _SPENT.items()
            if getattr(self, name) >= _SHOWN_S
        ]
        counts = [
            f"{self.counts[name]} {words if self.counts[name] > 1 else words.removesuffix('s')}"
            for name, words in _COUNTED.items()
            if self.counts.get(name)
        ]
        share = self.useful / self.total if self.total else 0.0
        parts = [f"{share:.0%} of {self.total:.1f} s trained", ", ".join(seconds), ", ".join(counts)]
        return "; ".join(part for part in parts if part)

    def save(self, path: Path) -> None:
        """Keep the account for a later driver."""
        # Every few seconds, by the thread that watches over the workers: it must not wait for a disk that is busy
        # with a checkpoint. What a power cut spoils begins anew.
        atomic_write(path, json.dumps(asdict(self)), durable=False, only_writer=True)

    @staticmethod
    def load(path: Path) -> TimeAccounting:
        """The account kept at `path`; a new one if there is none or it is torn."""
        try:
            with open_regular(path) as file:
                kept: dict[str, Any] = json.loads(file.read())
            kept["recoveries"] = [Recovery(**entry) for entry in kept["recoveries"]]
            kept["_recent"] = {int(step): seconds for step, seconds in kept["_recent"].items()}
            return TimeAccounting(**kept)
        except FileNotFoundError:
            return TimeAccounting()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning(
                "the time account in %s cannot be read and starts again from zero: %s", path, error
            )
            return TimeAccounting()

    def _accrue(self, now: float) -> None:
        elapsed = max(0.0, now - self._since)
        self._since = now
        match self.state:
            case "startup":
                self.startup += elapsed
            case "training":
                self.useful += elapsed
            case "restart":
                self.restart += elapsed
            case "waiting":
                self.waiting += elapsed


def report_metrics(goodput: TimeAccounting) -> dict[str, float]:
    """The few metrics of the account that belong into a stage's summary."""
    metrics = goodput.metrics()
    return {
        name: metrics[name] for name in ("goodput", "seconds_total", "restarts", "preemptions", "steps_lost")
    }
