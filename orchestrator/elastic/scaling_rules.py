"""When a job starts a worker group, when it resizes it, when it waits: pure rules that know nothing of Ray.

Ray Train's controller asks through `scaling_policy.py`, and `orchestrator simulate` asks directly, so what a
simulation predicts is what a cluster does. Times are seconds on any clock that the caller sticks to.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from orchestrator.elastic.worker_pool import WorkerPool
from orchestrator.training.checkpoint.interval import mtbf

# Growth must earn its restart twice over.
_RESIZE_GAIN = 2.0
# What a planned restart is believed to take before one was seen.
_FIRST_RESTART_S = 5.0

Shape = TypeVar("Shape", bound=Hashable)


class SlotView(Protocol):
    """What the rules see of a ready slot (see :class:`worker_pool.Slot`)."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def leaving(self) -> bool:
        """Whether a worker group should do without it."""


@dataclass(frozen=True)
class JobView:
    """What a decision is made from.

    Attributes:
        workers: minimum and maximum; they may change while a group runs.
        num_blocks: blocks of a step.
        slots: ready slots that the job has or may acquire, those of the running group first.
        group: names of the running group's slots; empty if none runs.
        stopping: the group was already asked to checkpoint and stop.
        starting: slots that are there but still import.
        stepped: a group of this job has taken a step.
        waited_s: since a group could have been started and was not.
        since_resize_s: since the running group was started.
        step_s: duration of a step at the group's size, if known.
        steps_left: of the job.
        restart_s: what a planned restart costs, checkpoint included.
        resize_share: the largest share of the time that growing may take.
    """

    workers: tuple[int, int]
    num_blocks: int
    slots: Sequence[SlotView]
    group: tuple[str, ...] = ()
    stopping: bool = False
    starting: int = 0
    stepped: bool = False
    waited_s: float = 0.0
    since_resize_s: float = 0.0
    step_s: float | None = None
    steps_left: int = 0
    restart_s: float = _FIRST_RESTART_S
    resize_share: float = 0.1


@dataclass(frozen=True)
class Start:
    """Start a group on these slots."""

    slots: tuple[str, ...]


@dataclass(frozen=True)
class RequestStop:
    """Ask the group to checkpoint at the next step's end and to stop; a new one is started then."""

    reason: str


@dataclass(frozen=True)
class Keep:
    """Nothing to do."""


@dataclass(frozen=True)
class Wait:
    """There is no group and none can be started now."""

    reason: str


Decision = Start | RequestStop | Keep | Wait


def decide(view: JobView) -> Decision:
    """What to do now.

    A group is started as soon as the minimum of workers can be; it does not wait for machines that may never come
    back. Only before the first step, when a second slot is about to be ready, does it wait as long as a restart
    would cost. Notice is taken at once: the computing that a doomed machine could still do is less than the steps
    that are lost when it goes early. Growth must be worth its restart. A group with more workers than it may have
    gives them up, unless it is about to end.
    """
    staying = [slot.name for slot in view.slots if not slot.leaving]
    minimum = view.workers[0]
    if not view.group:
        if len(staying) < minimum:
            return Wait(f"{len(staying)} of at least {minimum} workers have a machine")
        wanted = useful_workers(len(staying), view)
        more = min(len(staying) + view.starting, view.workers[1])
        if (
            not view.stepped
            and view.waited_s < view.restart_s
            and useful_workers(max(more, minimum), view) > wanted
        ):
            return Wait("more workers are about to be ready")
        return Start(tuple(staying[:wanted]))
    if view.stopping:
        return Keep()
    leaving = {slot.name for slot in view.slots if slot.leaving}
    if going := sum(slot in leaving for slot in view.group):
        return RequestStop(f"notice for {going} of {len(view.group)} workers")
    if len(view.group) > view.workers[1] and not _about_to_end(view):
        return RequestStop(f"from {len(view.group)} to {view.workers[1]} workers, others need them more")
    wanted = useful_workers(max(minimum, len(staying)), view)
    if wanted > len(view.group) and len(staying) >= wanted and _worth_growing(view, wanted):
        return RequestStop(f"growth from {len(view.group)} to {wanted} workers")
    return Keep()


def holds_for_s(view: JobView, decision: Decision) -> float:
    """For how many seconds `decide` repeats this decision if only time goes on; inf if nothing but news changes it."""
    if isinstance(decision, Wait) and sum(not slot.leaving for slot in view.slots) >= view.workers[0]:
        return max(0.0, view.restart_s - view.waited_s)
    if isinstance(decision, Keep) and len(view.group) < view.workers[1]:
        until = view.restart_s / view.resize_share - view.since_resize_s
        return until if until > 0 else math.inf
    return math.inf


def useful_workers(available: int, view: JobView) -> int:
    """How many of `available` workers to use: those past this number would only wait for the others.

    A step takes as long as the worker with most blocks, ceil(blocks / workers) of them.
    """
    minimum, maximum = view.workers
    workers = min(available, maximum)
    per_worker = -(-view.num_blocks // workers)
    return max(minimum, -(-view.num_blocks // per_worker))


def _about_to_end(view: JobView) -> bool:
    return view.step_s is not None and view.steps_left * view.step_s <= view.restart_s


def _worth_growing(view: JobView, workers: int) -> bool:
    if view.step_s is None or view.since_resize_s * view.resize_share < view.restart_s:
        return False
    now = -(-view.num_blocks // len(view.group))
    then = -(-view.num_blocks // workers)
    return view.steps_left * view.step_s * (1 - then / now) > _RESIZE_GAIN * view.restart_s


class JobScaling:
    """What a job knows of its worker groups so far, and what it decides from that.

    Args:
        job: its name in the pool.
        pool: that it gets slots from.
        workers: minimum and maximum; may be set anew at any time.
        num_blocks: blocks of a step.
        num_steps: steps of the job.
        resize_share: the largest share of the time that growing may take.
        now: when the job begins.
    """

    def __init__(
        self,
        job: str,
        pool: WorkerPool[Shape],
        workers: tuple[int, int],
        *,
        num_blocks: int,
        num_steps: int,
        resize_share: float,
        now: float,
    ) -> None:
        self.job, self.pool, self.workers = job, pool, workers
        self.num_blocks, self.num_steps, self.resize_share = num_blocks, num_steps, resize_share
        self.group: tuple[str, ...] = ()
        self.stopping = ""
        self.step, self.step_s = 0, None  # type: int, float | None
        self.restart_s = _FIRST_RESTART_S
        self.losses = 0
        self.began = self.started = now
        self._ready_since: float | None = None
        self._restart_began: float | None = None
        self._has_stepped = self._short = False

    def view(self, now: float) -> JobView:
        """What a decision at `now` is made from."""
        slots = self.pool.available(self.job)
        if not self.group:
            self._note_wait(self.count_staying(slots) >= self.workers[0], now)
        return JobView(
            workers=self.workers,
            num_blocks=self.num_blocks,
            slots=slots,
            group=self.group,
            stopping=bool(self.stopping),
            starting=self.pool.starting(self.job),
            stepped=self._has_stepped,
            waited_s=now - self._ready_since if self._ready_since is not None else 0.0,
            since_resize_s=now - self.started if self.group else 0.0,
            step_s=self.step_s,
            steps_left=self.num_steps - self.step,
            restart_s=self.restart_s,
            resize_share=self.resize_share,
        )

    def decide(self, now: float) -> Decision:
        """What to do at `now`; the caller does it, and says so by the methods below."""
        return decide(self.view(now))

    @staticmethod
    def count_staying(slots: Sequence[SlotView]) -> int:
        """How many of these slots do not leave."""
        return sum(not slot.leaving for slot in slots)

    def group_started(self, names: tuple[str, ...], now: float) -> None:
        """A group was started on these slots."""
        self.group, self.stopping, self.started = names, "", now

    def stop_requested(self, reason: str) -> None:
        """The group was asked to checkpoint and stop."""
        self.stopping = reason

    def stepped(self, step: int, step_s: float, now: float) -> None:
        """The group has done `step` steps in all; the last one took `step_s`."""
        self.step, self._has_stepped = step, True
        self.step_s = step_s if self.step_s is None else self.step_s + 0.3 * (step_s - self.step_s)
        if self._restart_began is not None:
            self.restart_s = 0.5 * self.restart_s + 0.5 * (now - self._restart_began)
            self._restart_began = None

    def group_ended(self, now: float, *, lost: bool) -> None:
        """The group ended, as it was asked to or because workers were `lost`; its slots are free again."""
        self.group, self.stopping = (), ""
        self.started = self._restart_began = now
        self._ready_since, self._short, self.step_s = None, False, None
        self.losses += lost
        self.pool.release(self.job, now)

    def mtbf_s(self, now: float) -> float:
        """Mean time between failures, from what was seen so far."""
        return mtbf(now - self.began, self.losses)

    def _note_wait(self, enough: bool, now: float) -> None:
        """There is no group, and there are slots `enough` for one, or not."""
        if not enough:
            self._ready_since, self._short = None, True
        elif self._ready_since is None:
            self._ready_since = now
            if self._short and self._restart_began is not None:
                # The wait for machines is not part of what a restart takes.
                self._restart_began = now
