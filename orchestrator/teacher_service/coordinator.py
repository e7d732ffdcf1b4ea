"""The coordinator of a teacher service: which teacher computes which step, and where each student finds it.

The teachers are frozen, so their outputs for step t are a function of t alone: any of them can compute any step,
running ahead makes nothing stale, and what was thrown away or lost with its actor is computed again. The coordinator
holds references, not arrays; it computes nothing, so one serves any number of teachers and students.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.teacher_service.window import Window

# A call comes back empty after so long, so that the call of one that is gone does not stay.
_ANSWER_S = 2.0
_POLL_S = 1.0

# What, where and hint of a `UserError`.
Mistake = tuple[str, str | None, str | None]


@dataclass(frozen=True)
class StepRefs:
    """A step that is there.

    Attributes:
        refs: of each part the references to its chunks, in the order of their blocks.
        per_chunk: of each part the blocks in a chunk.
    """

    refs: Mapping[str, list[Any]]
    per_chunk: Mapping[str, int]

    def has(self, ref: str) -> bool:
        """Whether one of its chunks is this object."""
        return any(own.hex() == ref for refs in self.refs.values() for own in refs)


@dataclass
class _Teacher:
    heard: float
    step: int | None = None
    since: float = 0.0
    retiring: bool = False


@dataclass(frozen=True)
class Status:
    """What the coordinator knows of itself.

    Attributes:
        account: what was counted.
        teachers: of each the step it is at, seconds at it, and seconds since it was heard of.
        depth: steps that are held.
        held_s: seconds that others waited at the window's end, by the student they waited for.
        trouble: the traceback of the last failed step.
        unasked_s: seconds since a student asked for a step, or since the coordinator began.
    """

    account: TeacherCounters
    teachers: Mapping[str, tuple[int | None, float, float]] = field(default_factory=dict)
    depth: int = 0
    held_s: Mapping[str, float] = field(default_factory=dict)
    trouble: str = ""
    unasked_s: float = 0.0


class StepCoordinator:
    """The Ray actor in the middle. All of it runs in one event loop; nothing here waits, except for changes.

    Args:
        students: see :class:`Window`.
        num_steps: steps 0 … num_steps-1 exist.
        window: see :class:`Window`.
        patience_s: see :class:`Window`.
        account: what was counted before.
    """

    def __init__(
        self,
        students: Mapping[str, int | None],
        num_steps: int,
        *,
        window: int,
        patience_s: float,
        account: TeacherCounters,
    ) -> None:
        self._num_steps = num_steps
        self._window = Window(students, num_steps, window, patience_s, time.monotonic())
        self._account = account
        self._steps: dict[int, StepRefs] = {}
        self._failed: dict[int, str] = {}
        self._mistakes: dict[int, Mistake] = {}
        self._teachers: dict[str, _Teacher] = {}
        self._held_s: dict[str, float] = {}
        self._trouble = self._broken = ""
        self._asked = time.monotonic()
        self._news = asyncio.Event()

    # --- what students ask --------------------------------------------------------------------------------------

    async def step(self, student: str, step: int, lost: str | None = None) -> dict[str, Any]:
        """Where the parts of `step` are: `there` is a :class:`StepRefs`; `error` says why it will not come.

        Neither after some seconds: the caller asks again. Asking for a step that failed makes a teacher try again,
        and so does naming a chunk that is `lost`.
        """
        self._asked = time.monotonic()
        until = self._asked + _ANSWER_S
        if not self._window.request(student, step, self._asked):
            return {"error": f"{student} is not one of the students any more"}
        self._failed.pop(step, None)
        self._mistakes.pop(step, None)
        if lost is not None and step in self._steps and self._steps[step].has(lost):
            del self._steps[step]
        self._notify()
        while time.monotonic() < until:
            if step in self._steps:
                return {"there": self._steps[step]}
            if why := self._failed.get(step, self._broken):
                return {"error": why, "mistake": self._mistakes.get(step)}
            await self._wait_for(student, until)
        return {}

    async def deregister(self, student: str) -> None:
        """This student is done, failed or stopped: nobody waits for it any more."""
        self._window.deregister(student)
        self._notify()

    async def _wait_for(self, student: str, until: float) -> None:
        """Wait for news; the time counts against whoever holds this student back."""
        began = time.monotonic()
        holder = self._window.holder(student, began)
        await self._wait_for_change(until)
        if holder is not None:
            self._held_s[holder] = self._held_s.get(holder, 0.0) + time.monotonic() - began

    # --- what teachers ask --------------------------------------------------------------------------------------

    async def next_step(self, teacher: str) -> dict[str, Any]:
        """The `step` to compute next, and the one that will probably be `next`; `end` when there will be no more for
        this teacher; neither: ask again.
        """
        until = time.monotonic() + _ANSWER_S
        own = self._teachers.setdefault(teacher, _Teacher(0.0))
        own.step = None
        while (now := time.monotonic()) < until:
            own.heard = now
            if own.retiring:
                del self._teachers[teacher]
                return {"end": True}
            if (step := self._next(now)) is not None:
                own.step, own.since = step, now
                # All teachers take turns while nothing happens.
                following = step + len(self._teachers)
                return {"step": step, "next": following if following < self._num_steps else None}
            await self._wait_for_change(min(until, now + _POLL_S))
        return {}

    async def publish(
        self, teacher: str, step: int, there: StepRefs, images: int, images_per_step: int, size: int
    ) -> None:
        """`step` is computed, with `images` forwards and `size` bytes."""
        self._free(teacher)
        self._broken = ""
        self._steps[step] = there
        self._account.images_per_step = images_per_step
        self._account.computed(step, images, size)
        self._notify()

    async def fail(
        self, teacher: str, step: int, why: str, trace: str, mistake: Mistake | None = None
    ) -> None:
        """The teacher could not compute `step`; `mistake` has what, where and hint if the user has to mend it."""
        self._free(teacher)
        self._failed[step], self._trouble = why, trace
        if mistake is not None:
            self._mistakes[step] = mistake
        self._notify()

    # --- what the driver asks -----------------------------------------------------------------------------------

    async def give_up(self, why: str) -> None:
        """Teachers end before their first outputs: students are told why, until there are outputs."""
        self._broken = why
        self._notify()

    async def retire(self, teacher: str) -> None:
        """This teacher gets no more steps; its next call to `next_step` ends it."""
        if teacher in self._teachers:
            self._teachers[teacher].retiring = True
            self._notify()

    async def forget(self, teacher: str, restarts: bool) -> None:
        """This teacher is gone: its step is for another. `restarts`: it had begun its work, so this counts."""
        self._teachers.pop(teacher, None)
        self._account.restarts += restarts
        self._notify()

    async def status(self, forwarded: int = -1) -> Status:
        """How things are. Waits some seconds for another count of forwarded images than `forwarded`."""
        until = time.monotonic() + _ANSWER_S
        while self._account.images_forwarded == forwarded and time.monotonic() < until:
            await self._wait_for_change(until)
        now = time.monotonic()
        return Status(
            account=replace(self._account),
            teachers={
                name: (one.step, now - one.since if one.step is not None else 0.0, now - one.heard)
                for name, one in self._teachers.items()
            },
            depth=len(self._steps),
            held_s=dict(self._held_s),
            trouble=self._trouble,
            unasked_s=now - self._asked,
        )

    # --- inside -------------------------------------------------------------------------------------------------

    def _next(self, now: float) -> int | None:
        """The most urgent step that is neither there nor in the making; drops those nobody will ask for."""
        for step in [step for step in self._steps if not self._window.is_kept(step, now)]:
            del self._steps[step]
        done = {*self._steps, *self._failed, *(one.step for one in self._teachers.values())}
        return next((step for step in self._window.requested_steps(now) if step not in done), None)

    def _free(self, teacher: str) -> None:
        own = self._teachers.get(teacher)
        if own is not None:
            own.step, own.heard = None, time.monotonic()

    def _notify(self) -> None:
        """Wake everybody who waits."""
        self._news.set()
        self._news = asyncio.Event()

    async def _wait_for_change(self, until: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), max(0.0, until - time.monotonic()))
