"""One training job on the machines of a trace: what Ray Train's controller does, without its processes.

`elastic/scaling_rules.py` and `elastic/failure_rules.py` decide, as they do on a cluster; here is what their decisions
take, and which account the seconds go to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.elastic.scaling_rules import JobScaling, RequestStop, Start, decide, holds_for_s
from orchestrator.elastic.worker_pool import Slot
from orchestrator.simulation.costs import StageCosts
from orchestrator.simulation.machines import Machines
from orchestrator.simulation.worker_group import Group
from orchestrator.training.checkpoint.interval import checkpoint_interval

# Past a threshold of the rules for certain, whatever rounding did to the sum.
_PAST = 1e-6
# As in the engine: the least a checkpoint is taken to cost.
_LEAST_COST_S = 0.05


@dataclass(frozen=True)
class JobPlan:
    """What a job has to do: `interval_s` is None where the engine chooses the time between checkpoints."""

    name: str
    num_steps: int
    num_blocks: int
    workers: tuple[int, int]
    interval_s: float | None
    costs: StageCosts
    resize_share: float = 0.1


@dataclass
class SimulatedTime:
    """Where a job's seconds went, as `elastic/time_accounting.py` books them, and how often what happened.

    `useful`: steps that survived. `startup`: until the first step begins. `lost`: steps that were computed, then
    lost. `checkpoint`: training stood still for one. `waiting`: fewer machines than the minimum of workers.
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
class SimulatedJob:
    """A job from `now` on; `next_time` and `advance` let time go on, `decide` is the controller."""

    plan: JobPlan
    machines: Machines
    now: float
    step: int = 0
    done: bool = False
    account: SimulatedTime = field(default_factory=SimulatedTime)
    _group: Group | None = None
    _loss_known_at: float | None = None  # the group is lost, and the controller does not know of it yet
    _wake: float = math.inf
    _mtbf_s: float = math.inf
    _short: bool = False  # of machines
    _has_begun: bool = False

    def __post_init__(self) -> None:
        plan = self.plan
        self._scaling = JobScaling(
            plan.name,
            self.machines.pool,
            plan.workers,
            num_blocks=plan.num_blocks,
            num_steps=plan.num_steps,
            resize_share=plan.resize_share,
            now=self.now,
        )
        self.machines.request(plan.name, plan.workers, plan.costs.warm_s)

    # --- time -------------------------------------------------------------------------------------------------

    def next_time(self) -> float:
        """When something happens in here next."""
        group_ends = self._group.phase_ends if self._group is not None else math.inf
        return min(self._wake, group_ends, math.inf if self._loss_known_at is None else self._loss_known_at)

    def advance(self, to: float) -> bool:
        """Book the time up to `to`; whether the controller has something new to see."""
        elapsed, self.now = to - self.now, to
        group = self._group
        if group is None:
            self._book_without_steps(elapsed)
            return to >= self._wake or to == self._loss_known_at
        phase, had_stepped = group.phase, group.has_stepped
        group.advance(to)
        self.account.worker_s += elapsed * len(self._scaling.group)
        if phase in ("stalled", "ending"):
            self.account.checkpoint += elapsed
        elif phase in ("starting", "stopping"):
            self._book_without_steps(elapsed)
        first_step = group.has_stepped and not had_stepped
        if group.phase == phase and not first_step:
            return to >= self._wake
        return self._phase_changed(group, first_step)

    def slots_lost(self, lost: Iterable[Slot[Any]]) -> None:
        """These slots went with their machines just now."""
        if self._group is None or not any(slot.job == self.plan.name for slot in lost):
            return
        self._book_group(self._group, lost_steps=self._group.steps_done() - self._group.safe.step)
        self.account.preemptions += 1
        self.account.restarts += 1
        self._loss_known_at = self.now + self.plan.costs.detect_s
        self._wake = math.inf

    def stop(self) -> None:
        """The record ends here: what a running group has done so far counts, for it was not lost."""
        group = self._group
        if group is not None:
            self.account.useful += group.stepped_s
            self.account.checkpoints += group.num_saves
            self.step = group.steps_done()
            self._group = None

    # --- the controller ---------------------------------------------------------------------------------------

    def decide(self) -> None:
        """Ask the rules what to do, and do it."""
        if self.done or (self._loss_known_at is not None and self.now < self._loss_known_at):
            return
        if self._loss_known_at is not None:
            self._loss_known_at = None
            self._scaling.group_ended(self.now, lost=True)
        if self._group is not None:
            self._report(self._group)
        view = self._scaling.view(self.now)
        decision = decide(view)
        self._wake = self.now + holds_for_s(view, decision) + _PAST
        if self._group is None:
            staying = self._scaling.count_staying(view.slots)
            self._short = staying + view.starting < self.plan.workers[0]
            if isinstance(decision, Start):
                self._start(decision.slots)
        elif isinstance(decision, RequestStop):
            self._scaling.stop_requested(decision.reason)
            self._group.request_stop()

    def _start(self, names: tuple[str, ...]) -> None:
        plan, costs = self.plan, self.plan.costs
        self.machines.pool.acquire(plan.name, names, self.now)
        self._scaling.group_started(names, self.now)
        # As in the engine: what is known when a group starts holds as long as it lives.
        self._mtbf_s = self._scaling.mtbf_s(self.now)
        step_s = costs.step(plan.num_blocks, len(names))
        self._group = Group(self.now, self.step, plan.num_steps, step_s, costs, self._interval)

    def _interval(self) -> float:
        if self.plan.interval_s is not None:
            return self.plan.interval_s
        seen = self.plan.costs.stall_s if self._group is not None and self._group.num_saves else 0.0
        return checkpoint_interval(max(seen, _LEAST_COST_S), self._mtbf_s)

    def _report(self, group: Group) -> None:
        if group.has_stepped:
            self._scaling.stepped(group.steps_done(), group.step_s, self.now)

    # --- what happens to the group ----------------------------------------------------------------------------

    def _phase_changed(self, group: Group, first_step: bool) -> bool:
        self._has_begun = self._has_begun or group.phase == "stepping"
        self._report(group)
        if group.phase == "done":
            self._book_group(group, lost_steps=0)
            self.done = True
            self.machines.withdraw(self.plan.name, self.now)
        elif group.phase == "stopped":
            self.account.resizes += 1
            self.account.preemptions_announced += self._scaling.stopping.startswith("notice")
            self._book_group(group, lost_steps=0)
            self._scaling.group_ended(self.now, lost=False)
        else:
            # What a step takes is known from the first one on, and growth may be worth it then.
            return first_step
        return True

    def _book_group(self, group: Group, lost_steps: int) -> None:
        """Book its steps: those up to its newest checkpoint were useful."""
        self.account.useful += group.safe.stepped_s
        self.account.lost += group.stepped_s - group.safe.stepped_s
        self.account.steps_lost += lost_steps
        self.account.checkpoints += group.num_saves
        self.step = group.safe.step
        self._group = None

    def _book_without_steps(self, elapsed: float) -> None:
        if self._group is None and self._short and self._loss_known_at is None:
            self.account.waiting += elapsed
        elif self._has_begun:
            self.account.restart += elapsed
        else:
            self.account.startup += elapsed
