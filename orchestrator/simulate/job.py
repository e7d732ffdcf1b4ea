"""One training job on the fleet: the controller's loop without processes; `elastic/policy.py` decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from orchestrator.elastic import policy
from orchestrator.elastic.policy import Budget, Form, JobView, Keep, Wait, Yield
from orchestrator.simulate.costs import StageCosts
from orchestrator.simulate.group import Group
from orchestrator.simulate.seats import Demand, Fleet, Seat

# Past a threshold of the policy for certain, whatever rounding did to the sum.
_PAST = 1e-6
# As in the engine: what a restart is believed to take before one was seen, and the least a checkpoint costs.
_FIRST_RESTART_S = 5.0
_LEAST_COST_S = 0.05


@dataclass(frozen=True)
class JobPlan:
    """What a job has to do: `interval_s` is None where the engine chooses the time between checkpoints."""

    name: str
    num_steps: int
    num_blocks: int
    workers: tuple[int, int]
    interval_s: float | None
    max_failures: int
    costs: StageCosts
    resize_share: float = 0.1


@dataclass
class Account:
    """Where a job's seconds went, as `elastic/goodput.py` books them, and how often what happened.

    `useful`: steps that survived. `startup`: until the first step begins. `lost`: steps that were computed, then
    lost. `checkpoint`: training stood still for one. `waiting`: fewer machines than the fewest workers.
    `restart`: from the end of a group until the next one's first step begins. `resizes` are planned ends of a
    group, for a notice (`preemptions_announced`) or for growth; `restarts` are the others.
    """

    useful: float = 0.0
    startup: float = 0.0
    lost: float = 0.0
    checkpoint: float = 0.0
    waiting: float = 0.0
    restart: float = 0.0
    steps_lost: int = 0
    preemptions: int = 0
    preemptions_announced: int = 0
    resizes: int = 0
    restarts: int = 0
    checkpoints: int = 0
    worker_s: float = 0.0

    @property
    def total(self) -> float:
        """All seconds."""
        return self.useful + self.startup + self.lost + self.checkpoint + self.waiting + self.restart


@dataclass
class Job:
    """A job from `now` on; `next_time` and `advance` let time go on, `decide` is the controller."""

    plan: JobPlan
    fleet: Fleet
    now: float
    step: int = 0
    done: bool = False
    account: Account = field(default_factory=Account)
    _group: Group | None = None
    _names: tuple[str, ...] = ()
    _yielding: str = ""
    _since: float = 0.0  # there has been no group, or this group
    _blind_until: float = -math.inf  # a loss that the controller does not know of yet
    _wake: float = math.inf
    _short: bool = False  # of machines
    _has_begun: bool = False
    _has_stepped: bool = False
    _losses: int = 0
    _restart_s: float = _FIRST_RESTART_S
    _ready_since: float | None = None  # enough seats for the fewest workers, and no group
    _ended_at: float | None = None  # the last group, as far as the controller knows

    def __post_init__(self) -> None:
        self.began = self._since = self.now
        self._budget = Budget(self.plan.max_failures)
        fewest, most = self.plan.workers
        self.fleet.want(self.plan.name, Demand(fewest, most, self.plan.costs.warm_s))

    # --- time -------------------------------------------------------------------------------------------------

    def next_time(self) -> float:
        """When something happens in here next."""
        times = [self._wake]
        if self._group is not None:
            times.append(self._group.phase_ends)
        if self._blind_until > self.now:
            times.append(self._blind_until)
        return min(times)

    def advance(self, to: float) -> bool:
        """Book the time up to `to`; whether the controller has something new to see."""
        elapsed, self.now = to - self.now, to
        group = self._group
        if group is None:
            self._book_without_steps(elapsed)
            return to >= self._wake or to == self._blind_until
        phase, had_stepped = group.phase, group.has_stepped
        group.advance(to)
        self.account.worker_s += elapsed * len(self._names)
        if phase in ("stalled", "ending"):
            self.account.checkpoint += elapsed
        elif phase in ("starting", "leaving"):
            self._book_without_steps(elapsed)
        if group.phase == phase:
            return to >= self._wake
        return self._phase_changed(group, had_stepped)

    def seats_lost(self, lost: list[Seat]) -> None:
        """These seats went with their machines just now."""
        if self._group is None or not any(seat.job == self.plan.name for seat in lost):
            return
        group = self._group
        self._end_group(lost_steps=group.steps_done() - group.safe.step)
        self._losses += 1
        self._budget.preempted()
        self.account.preemptions += 1
        self.account.restarts += 1
        self._blind_until = self._ended_at = self.now + self.plan.costs.detect_s
        self._wake = math.inf

    # --- the controller ---------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Ask the policy what to do, and do it."""
        if self.done or self.now < self._blind_until:
            return
        view = self._view()
        decision = policy.decide(view)
        self._wake = math.inf
        match decision:
            case Form(seats):
                self._form(seats)
            case Yield(reason):
                assert self._group is not None
                self._yielding = reason
                self._group.leave()
            case Wait():
                if self._ready_since is not None and view.waited_s < view.restart_s:
                    self._wake = self._ready_since + view.restart_s + _PAST
            case Keep():
                ripe = self._since + view.restart_s / view.resize_share + _PAST
                if self.now < ripe and len(self._names) < self.plan.workers[1]:
                    self._wake = ripe

    def _view(self) -> JobView:
        offered = self.fleet.on_offer(self.plan.name)
        coming = self.fleet.coming()
        seats = tuple([seat.view for seat in offered])
        staying = [view.leaving for view in seats].count(False)
        self._short = staying + coming < self.plan.workers[0]
        if self._ready_since is None and staying >= self.plan.workers[0]:
            self._ready_since = self.now
        group = self._group
        return JobView(
            workers=self.plan.workers,
            num_blocks=self.plan.num_blocks,
            seats=seats,
            group=self._names,
            yielding=bool(self._yielding),
            warming=coming,
            stepped=self._has_stepped,
            waited_s=self.now - self._ready_since if self._ready_since is not None else 0.0,
            since_resize_s=self.now - self._since if group else 0.0,
            step_s=group.step_s if group and group.has_stepped else None,
            steps_left=self.plan.num_steps - (group.steps_done() if group else self.step),
            restart_s=self._restart_s,
            resize_share=self.plan.resize_share,
        )

    def _form(self, names: tuple[str, ...]) -> None:
        plan, costs = self.plan, self.plan.costs
        self.fleet.take(plan.name, names)
        self._names, self._yielding, self._since = names, "", self.now
        step_s = costs.step(plan.num_blocks, len(names))
        self._group = Group(self.now, self.step, plan.num_steps, step_s, costs, self._interval)

    def _interval(self) -> float:
        if self.plan.interval_s is not None:
            return self.plan.interval_s
        # As in the engine: what is known when the group is formed holds as long as it lives.
        mtbf_s = policy.mtbf(self._since - self.began, self._losses)
        seen = self.plan.costs.stall_s if self._group is not None and self._group.num_saves else 0.0
        return policy.checkpoint_interval(max(seen, _LEAST_COST_S), mtbf_s)

    # --- what happens to the group ----------------------------------------------------------------------------

    def _phase_changed(self, group: Group, had_stepped: bool) -> bool:
        if group.phase == "stepping":
            self._has_begun = True
        if group.has_stepped:
            self._has_stepped = True
            self._budget.progress(group.step)
        if group.phase == "done":
            self._end_group(lost_steps=0)
            self.done = True
            self.fleet.leave(self.plan.name, self.now)
        elif group.phase == "left":
            self.account.resizes += 1
            self.account.preemptions_announced += self._yielding.startswith("notice")
            self._ended_at = self.now
            self._end_group(lost_steps=0)
        else:
            if had_stepped or not group.has_stepped:
                return False
            # What a step takes is known from the first one on, and growth may be worth it then.
            if self._ended_at is not None:
                self._restart_s = 0.5 * self._restart_s + 0.5 * (self.now - self._ended_at)
                self._ended_at = None
        return True

    def _end_group(self, lost_steps: int) -> None:
        """Book its steps: those up to its newest checkpoint were useful."""
        group = self._group
        assert group is not None
        self.account.useful += group.safe.stepped_s
        self.account.lost += group.stepped_s - group.safe.stepped_s
        self.account.steps_lost += lost_steps
        self.account.checkpoints += group.num_saves
        self.step = group.safe.step
        self._group, self._names, self._yielding = None, (), ""
        self._since, self._ready_since = self.now, None
        self.fleet.give_back(self.plan.name)

    def stop(self) -> None:
        """The record ends here: what a running group has done so far counts, for it was not lost."""
        group = self._group
        if group is not None:
            self.account.useful += group.stepped_s
            self.account.checkpoints += group.num_saves
            self.step = group.steps_done()
            self._group = None

    def _book_without_steps(self, elapsed: float) -> None:
        if self._group is None and self._short and self.now > self._blind_until:
            self.account.waiting += elapsed
        elif self._has_begun:
            self.account.restart += elapsed
        else:
            self.account.startup += elapsed
