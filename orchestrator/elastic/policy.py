"""What an elastic job decides, as pure functions: when to form a group, when to break it up, when to give up.

The controller (`job.py`) and the simulator (`orchestrator simulate`) call the same functions, so what a simulation
predicts is what a cluster does. Nothing here knows of Ray, processes or clocks; times are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# A machine lost in the first hour of a job: what is believed before anything was seen.
PRIOR_MTBF_S = 3600.0
MIN_INTERVAL_S, MAX_INTERVAL_S = 2.0, 600.0
# Growth must earn its restart twice over.
_RESIZE_GAIN = 2.0
# A job that dies so often in a row without one new step will not get anywhere.
MAX_STALLED_ATTEMPTS = 8


@dataclass(frozen=True)
class SeatView:
    """A warm place for one worker that this job has or may have. `leaving`: its node announced its end."""

    seat: str
    node: str
    leaving: bool = False


@dataclass(frozen=True)
class JobView:
    """What the controller knows when it decides.

    Attributes:
        workers: fewest and most; they may change while a group runs.
        num_blocks: blocks of a step.
        seats: warm places, those of the running group first.
        group: seats of the running group; empty if none runs.
        yielding: the group was already asked to checkpoint and end.
        warming: places that are there but whose process is still importing.
        stepped: a group of this attempt at the stage has taken a step.
        waited_s: since a group could have been formed and was not.
        since_resize_s: since the running group was formed.
        step_s: duration of a step at the group's size, if known.
        steps_left: of the job.
        restart_s: what a planned restart costs, checkpoint included.
        resize_share: the most of the time that growing may take.
    """

    workers: tuple[int, int]
    num_blocks: int
    seats: tuple[SeatView, ...]
    group: tuple[str, ...] = ()
    yielding: bool = False
    warming: int = 0
    stepped: bool = False
    waited_s: float = 0.0
    since_resize_s: float = 0.0
    step_s: float | None = None
    steps_left: int = 0
    restart_s: float = 5.0
    resize_share: float = 0.1


@dataclass(frozen=True)
class Form:
    """Start a group on these seats."""

    seats: tuple[str, ...]


@dataclass(frozen=True)
class Yield:
    """Ask the group to checkpoint at the next step's end and to end; a new one is formed then."""

    reason: str


@dataclass(frozen=True)
class Keep:
    """Nothing to do."""


@dataclass(frozen=True)
class Wait:
    """There is no group and none can be formed now."""

    reason: str


Decision = Form | Yield | Keep | Wait


def decide(view: JobView) -> Decision:
    """What to do now.

    A group is formed as soon as the fewest workers can be; it does not wait for machines that may never come
    back. Only before the first step, when a second process is about to be warm, does it wait as long as a restart
    would cost. Notice is taken at once: the computing that a doomed machine could still do is less than the steps
    that are lost when it goes early. Growth must be worth its restart. A group with more workers than it may have
    gives them up, unless it is about to end.
    """
    staying = [seat.seat for seat in view.seats if not seat.leaving]
    fewest = view.workers[0]
    if not view.group:
        if len(staying) < fewest:
            return Wait(f"{len(staying)} of at least {fewest} workers have a machine")
        wanted = useful_workers(len(staying), view)
        more = min(len(staying) + view.warming, view.workers[1])
        if (
            not view.stepped
            and view.waited_s < view.restart_s
            and useful_workers(max(more, fewest), view) > wanted
        ):
            return Wait("more workers are about to be ready")
        return Form(tuple(staying[:wanted]))
    if view.yielding:
        return Keep()
    leaving = {seat.seat for seat in view.seats if seat.leaving}
    if going := sum(seat in leaving for seat in view.group):
        return Yield(f"notice for {going} of {len(view.group)} workers")
    if len(view.group) > view.workers[1] and not _about_to_end(view):
        return Yield(f"from {len(view.group)} to {view.workers[1]} workers, others need them more")
    wanted = useful_workers(max(fewest, len(staying)), view)
    if wanted > len(view.group) and len(staying) >= wanted and _worth_growing(view, wanted):
        return Yield(f"growth from {len(view.group)} to {wanted} workers")
    return Keep()


def useful_workers(available: int, view: JobView) -> int:
    """How many of `available` workers to use: those past this number would only wait for the others.

    A step takes as long as the worker with most blocks, ceil(blocks / workers) of them.
    """
    fewest, most = view.workers
    workers = min(available, most)
    slots = -(-view.num_blocks // workers)
    return max(fewest, -(-view.num_blocks // slots))


def _about_to_end(view: JobView) -> bool:
    return view.step_s is not None and view.steps_left * view.step_s <= view.restart_s


def _worth_growing(view: JobView, workers: int) -> bool:
    if view.step_s is None or view.since_resize_s * view.resize_share < view.restart_s:
        return False
    now = -(-view.num_blocks // len(view.group))
    then = -(-view.num_blocks // workers)
    return view.steps_left * view.step_s * (1 - then / now) > _RESIZE_GAIN * view.restart_s


# --- checkpoints ------------------------------------------------------------------------------------------


def mtbf(elapsed_s: float, losses: int) -> float:
    """Mean time between losses of a group, in seconds: what was seen, and one loss in `PRIOR_MTBF_S` before it."""
    return (PRIOR_MTBF_S + elapsed_s) / (1 + losses)


def checkpoint_interval(cost_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose least time: √(2·cost·MTBF) (Young, CACM 17(9), 1974), within limits."""
    return min(MAX_INTERVAL_S, max(MIN_INTERVAL_S, math.sqrt(2.0 * cost_s * mtbf_s)))


# --- giving up --------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """Tells losses that are nobody's fault from failures that will come again.

    A machine that goes, announced or not, never counts. An exception in the task counts against `max_failures`,
    and the same one twice at the same step ends the job at once: it would come a third time. A process that
    dies by itself, a hang, or a broken connection counts only while the job gets nowhere.
    """

    max_failures: int
    failures: int = 0
    stalled: int = 0
    best_step: int = -1
    last: tuple[int, str] | None = None
    seen: dict[str, int] = field(default_factory=dict)

    def progress(self, step: int) -> None:
        """`step` updates are done for the first time."""
        if step > self.best_step:
            self.best_step, self.stalled = step, 0

    def preempted(self) -> None:
        """A machine went."""
        self._note("preempted")

    def broke(self, what: str) -> bool:
        """A process died, hung or lost its peers, and no machine went; True if the job should give up."""
        self._note(what)
        self.stalled += 1
        return self.stalled >= MAX_STALLED_ATTEMPTS

    def failed(self, step: int, error: str) -> bool:
        """The task raised `error` (a name) at `step`; True if the job should give up."""
        self._note("failed")
        self.failures += 1
        again, self.last = self.last == (step, error), (step, error)
        return again or self.failures > self.max_failures

    def counts(self) -> Mapping[str, int]:
        """How often what happened."""
        return dict(self.seen)

    def _note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1
