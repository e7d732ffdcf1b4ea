"""A seeded storm over one pipeline run: faults every few seconds, spread over its steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from chaos import checks
from chaos.faults import KINDS, Fault, machine_added
from chaos.runs import Run
from chaos.scene import Scene

_POLL_S = 0.2
_NEW_STEPS, _WAIT_S = 2, 20.0
# All faults have come by this share of the steps.
_SHARE = 0.85
# Every so often a fault comes on the heels of another.
_AT_ONCE = 0.15
_COUNT_EVERY_S = 15.0


@dataclass
class Struck:
    """One fault that happened.

    Attributes:
        time: seconds since 1970.
        steps: recorded by then, of all jobs.
        lost: steps lost by then, as the engine counts them.
        recoveries: what controllers accounted for until the next fault.
        next_step: seconds until the first step after it.
    """

    kind: str
    what: str
    time: float
    steps: int
    lost: int
    steps_lost: int = 0
    next_step: float | None = None
    recoveries: list[dict[str, Any]] = field(default_factory=list)


class Storm:
    """A pipeline's run with faults, spread over its steps.

    Args:
        scene: where.
        run: what runs.
        faults: in the order wanted; one that is not possible when its turn comes waits for another.
        seed: of all other choices.
        steps: of all jobs together, so as to spread the faults.
        say: gets a line for each fault.

    Attributes:
        struck: what happened.
        wrong: what was seen on the way that must not be.
        checkpoints_seen: how many were looked at, file by file.
    """

    def __init__(
        self,
        scene: Scene,
        run: Run,
        faults: Sequence[Fault],
        *,
        seed: int,
        steps: int,
        say: Callable[[str], None],
    ) -> None:
        self.scene, self.sight, self.market = scene, run.sight, scene.market
        self.random = random.Random(seed)
        self.leaving: set[str] = set()
        self.tracking_is_away = False
        self.struck: list[Struck] = []
        self.checkpoints_seen = 0
        self.wrong: list[str] = []
        self._say, self._queue, self._steps = say, list(faults), steps
        self._number = len(self._queue)
        self._later: list[tuple[float, Callable[[], object]]] = []
        self._added = 0
        self._last = self._counted = time.monotonic()
        self._wait_s = _WAIT_S
        self._objects = checks.Objects(scene, run)
        self.driver = run.driver()
        self.began = time.time()

    def run(self, seconds: float) -> None:
        """Until the driver has ended well; whatever is still to be undone is undone then."""
        deadline = time.monotonic() + seconds
        while not self.driver.look():
            assert time.monotonic() < deadline, self.driver.tail()
            self._serve()
            if self._queue and self._due():
                self._strike()
            time.sleep(_POLL_S)
        self.ended = time.time()
        while self._later:
            self._serve(everything=True)
        self.sight.look()
        self._account()

    def missing(self) -> list[Fault]:
        """Faults for which there was no opportunity."""
        return self._queue

    # --- what faults use --------------------------------------------------------------------------------------

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Do `action` in so many seconds."""
        self._later.append((time.monotonic() + seconds, action))

    def staying(self) -> list[str]:
        """Machines that are up and have not announced their end."""
        return [name for name in self.market.machines if name not in self.leaving]

    def worker(self) -> psutil.Process | None:
        """A training process, if there is any."""
        workers = self.market.workers()
        return self.random.choice(workers) if workers else None

    def add_machine(self) -> str:
        """A new machine of one place."""
        self._added += 1
        name = f"s{self._added}"
        self.market.add(name)
        return name

    def calm_store(self) -> None:
        """The store is well again."""
        self.scene.proxy.rate = 0.0

    def restart_tracking(self) -> None:
        """The MLflow server is started again."""
        self.scene.tracking.start()
        self.tracking_is_away = False

    # --- the schedule -----------------------------------------------------------------------------------------

    def _serve(self, *, everything: bool = False) -> None:
        now = time.monotonic()
        due = [entry for entry in self._later if everything or entry[0] <= now]
        self._later = [entry for entry in self._later if entry not in due]
        for _, action in due:
            action()
        self.sight.look()
        if now - self._counted > _COUNT_EVERY_S:
            self._counted = now
            self.sight.count_memory_files(self.scene.processes())
            seen, wrong = checks.checkpoints(self._objects)
            self.checkpoints_seen += seen
            self.wrong += wrong

    def _due(self) -> bool:
        """After a little progress, and with the faults spread over the steps; in any case after a while."""
        waited = time.monotonic() - self._last
        steps = self.sight.steps()
        if not self.struck:
            return steps >= _NEW_STEPS
        new = steps - self.struck[-1].steps
        ahead = len(self.struck) / self._number - steps / (_SHARE * self._steps)
        return waited > self._wait_s or (new >= _NEW_STEPS and ahead <= 0) or (new >= 1 and ahead < -0.05)

    def _strike(self) -> None:
        for fault in self._candidates():
            what = fault(self)
            if what is None:
                continue
            now, kind = time.time(), fault.__name__.replace("_", " ")
            self.sight.look()
            self.struck.append(Struck(kind, what, now, self.sight.steps(), self.sight.lost()))
            if fault in self._queue:
                self._queue.remove(fault)
            self._say(f"{now - self.began:6.1f} s  {self.sight.steps():4} steps  {kind}: {what}")
            break
        self._last = time.monotonic()
        self._wait_s = 1.0 if self.random.random() < _AT_ONCE else _WAIT_S

    def _candidates(self) -> list[Fault]:
        """The queue from its front, each kind once; where machines are needed, one that brings one first."""
        kinds = list(dict.fromkeys(self._queue))
        if len(self.staying()) < 2 or (len(self.staying()) < 3 and self.random.random() < 0.5):
            return [machine_added, *kinds]
        return kinds

    # --- afterwards -------------------------------------------------------------------------------------------

    def _account(self) -> None:
        """Give each fault what came of it: all that was accounted for until the next one."""
        ends = [one.time for one in self.struck[1:]] + [self.ended]
        losses = [one.lost for one in self.struck[1:]] + [self.sight.lost()]
        for one, end, lost in zip(self.struck, ends, losses, strict=True):
            one.steps_lost = lost - one.lost
            one.recoveries = [r for r in self.sight.recoveries() if one.time <= r["detected"] < end]
            firsts = [float(r["first_step"]) for r in one.recoveries]
            first = max(firsts) if firsts else self.sight.first_step_after(one.time + 0.5)
            one.next_step = first - one.time if first is not None else None


def draw(number: int, seed: int) -> list[Fault]:
    """`number` faults: two of each kind, the rest by weight, in an order of their own."""
    chance = random.Random(seed)
    faults = [kind for kind in KINDS for _ in range(2)]
    faults += chance.choices(list(KINDS), list(KINDS.values()), k=max(0, number - len(faults)))
    chance.shuffle(faults)
    return faults
