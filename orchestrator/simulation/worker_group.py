"""One group of workers from its start to its end, step by step as `training/loop.py` goes, but many steps at once.

At a step's end the loop commits the checkpoint that is written by then, begins one if it is due and none is being
written, saves and stops if asked to, and saves and ends after the last step. Between such steps all are alike,
so time jumps from one of them to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from orchestrator.simulation.costs import StageCosts

Phase = Literal["starting", "stepping", "stalled", "stopping", "ending", "stopped", "done"]
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Safe:
    """A checkpoint: the step it is of, and the group's stepping seconds until then."""

    step: int
    stepped_s: float


class Group:
    """A group that was chosen at `now` and goes on from `step`.

    Args:
        now: when it was chosen.
        step: of the checkpoint it goes on from.
        num_steps: of the job.
        step_s: seconds of a step at its size.
        costs: the stage's.
        interval: seconds between checkpoints, asked anew for each.

    Attributes:
        phase: what it is doing; time in it is booked by the caller.
        phase_ends: when that will be over.
        step: steps done.
        stepped_s: seconds spent in steps, unfinished ones included, up to the last `advance`.
        safe: the newest committed checkpoint.
    """

    def __init__(
        self,
        now: float,
        step: int,
        num_steps: int,
        step_s: float,
        costs: StageCosts,
        interval: Callable[[], float],
    ) -> None:
        self.num_steps, self.step_s, self.costs = num_steps, step_s, costs
        self.step, self.first_step = step, step
        self.stepped_s, self.num_saves = 0.0, 0
        self.safe = Safe(step, 0.0)
        self.phase: Phase = "starting"
        self.phase_ends = now + costs.start_s + (costs.restore_s if step else 0.0)
        self._interval = interval
        self._now = now
        self._began = self._first_ends = math.nan  # of the present run of steps, and its first step's end
        self._run = 0
        self._saved_at = math.nan
        self._pending: tuple[float, Safe] | None = None  # a checkpoint that is written at that time
        self._stop = False

    @property
    def has_stepped(self) -> bool:
        """Whether it has done a step."""
        return self.step > self.first_step

    def advance(self, to: float) -> None:
        """Let time go on to `to`, at most to the phase's end."""
        elapsed, self._now = to - self._now, to
        if self.phase == "stepping":
            self.stepped_s += elapsed
        elif self.phase in ("stopping", "ending") and self._pending is not None and self._pending[0] <= to:
            self.safe, self._pending = self._pending[1], None
        if to >= self.phase_ends:
            self._next_phase()

    def steps_done(self) -> int:
        """Whole steps done by now."""
        if self.phase != "stepping" or self._now < self._first_ends:
            return self.step
        return self.step + 1 + math.floor((self._now - self._first_ends) / self.step_s + _ROUNDING)

    def request_stop(self) -> None:
        """Ask it to checkpoint at the next step's end and to stop."""
        self._stop = True
        if self.phase == "stepping":
            self._set_run(min(self._run, self.steps_done() - self.step + 1))

    def _next_phase(self) -> None:
        match self.phase:
            case "starting":
                self._saved_at = self._now
                self._begin_run()
            case "stepping":
                self.step += self._run
                self._end_of_step()
            case "stalled":
                self._saved_at = self._now
                self._pending = (self._now + self.costs.write_s, Safe(self.step, self.stepped_s))
                self.num_saves += 1
                self._begin_run()
            case "stopping" | "ending":
                self.safe = Safe(self.step, self.stepped_s)
                self.num_saves += 1
                self.phase = "stopped" if self.phase == "stopping" else "done"
                self.phase_ends = math.inf
            case _:
                raise AssertionError(self.phase)

    def _end_of_step(self) -> None:
        # As in the loop: what was being written when the workers agreed rules out a new checkpoint at this step.
        was_pending = self._pending is not None
        if self._pending is not None and self._pending[0] <= self._now + _ROUNDING:
            self.safe, self._pending = self._pending[1], None
        if self._stop or self.step == self.num_steps:
            # The file that is still being written is waited for, and committed, before the last one is begun.
            wait = max(0.0, self._pending[0] - self._now) if self._pending is not None else 0.0
            self.phase = "ending" if self.step == self.num_steps else "stopping"
            self.phase_ends = self._now + wait + self.costs.stall_s + self.costs.write_s
        elif not was_pending and self._now - self._saved_at >= self._interval() - _ROUNDING:
            self.phase, self.phase_ends = "stalled", self._now + self.costs.stall_s
        else:
            self._begin_run()

    def _begin_run(self) -> None:
        """Steps up to the next end of a step at which something is to be done."""
        extra = 0.0 if self.has_stepped else self.costs.first_step_s
        self.phase = "stepping"
        self._began, self._first_ends = self._now, self._now + extra + self.step_s
        if self._stop or not self.has_stepped:
            self._set_run(1)
            return
        due = self._saved_at + self._interval() if self._pending is None else self._pending[0]
        steps = 1 + math.ceil((due - self._first_ends) / self.step_s - _ROUNDING)
        self._set_run(min(max(1, steps), self.num_steps - self.step))

    def _set_run(self, steps: int) -> None:
        self._run = steps
        self.phase_ends = self._first_ends + (steps - 1) * self.step_s
