"""One teacher's results, computed once a step and handed to every student through the Ray object store.

The teacher is frozen, so what it says about step t is a function of t alone: it can run ahead without being
stale, and a step that was thrown away, or lost with its actor, can be computed again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from numpy.typing import NDArray

from orchestrator.sharing.account import Account
from orchestrator.sharing.window import Window

logger = logging.getLogger("orchestrator")

Bundle = Mapping[str, NDArray[Any]]

# A student's call comes back empty after so long, so that the call of one that is gone does not stay.
_ANSWER_S = 2.0
_LOOK_S = 1.0
_RETIRE_S = 30.0


class StepTeacher(Protocol):
    """Computes all that students need for one step. `images_per_step` counts images, not crops."""

    images_per_step: int
    images_forwarded: int

    def __call__(self, step: int) -> Bundle: ...


class ShareActor:
    """The Ray actor that owns the teacher, which works in a thread; calls are coroutines, so any number may wait.

    Args:
        make_teacher: builds the teacher in this process.
        students: see :class:`Window`.
        num_steps: steps 0 … num_steps-1 exist.
        window: see :class:`Window`.
        patience_s: see :class:`Window`.
        account: what was counted before.
    """

    def __init__(
        self,
        make_teacher: Callable[[], StepTeacher],
        students: Mapping[str, int | None],
        num_steps: int,
        *,
        window: int,
        patience_s: float,
        account: Account,
    ) -> None:
        self._make_teacher = make_teacher
        self._teacher: StepTeacher | None = None
        self._window = Window(students, num_steps, window, patience_s, time.monotonic())
        self._account = account
        self._refs: dict[int, Any] = {}
        self._failed: dict[int, str] = {}
        self._trouble = ""
        self._busy: tuple[int, float] | None = None
        self._retired = False
        self._changed = threading.Condition()
        self._waiting: set[asyncio.Future[None]] = set()
        threading.Thread(target=self._work, daemon=True).start()

    # --- what students and the driver ask; never waits with the lock held --------------------------------------

    async def step(self, student: str, step: int, lost: str | None = None) -> dict[str, Any]:
        """The bundle of `step`: `ref` is a list with a reference to it (Ray does not resolve it there).

        `error` says why there is none. Neither after some seconds: the caller asks again. Asking for a step that
        failed makes the teacher try again, and so does naming a reference whose object is `lost`.
        """
        until = asyncio.get_running_loop().time() + _ANSWER_S
        with self._changed:
            if not self._window.ask(student, step, time.monotonic()):
                return {"error": f"{student} is not one of the students any more"}
            self._failed.pop(step, None)
            if step in self._refs and self._refs[step].hex() == lost:
                del self._refs[step]
            self._changed.notify_all()
        while True:
            with self._changed:
                if step in self._refs:
                    return {"ref": [self._refs[step]]}
                if step in self._failed:
                    return {"error": self._failed[step]}
                news = self._news()
            if not await self._came(news, until):
                return {}

    async def leave(self, student: str) -> None:
        """This student is done, failed or stopped: nobody waits for it any more."""
        with self._changed:
            self._window.leave(student)
            self._changed.notify_all()

    async def status(self, forwarded: int = -1) -> dict[str, Any]:
        """The account, how long the teacher has been at which step, and the traceback of its last failure.

        Waits some seconds for another count of forwarded images than `forwarded`.
        """
        until = asyncio.get_running_loop().time() + _ANSWER_S
        while True:
            with self._changed:
                account = replace(self._account)
                step, since = self._busy or (None, time.monotonic())
                status = {"account": account, "step": step, "busy_s": time.monotonic() - since}
                news = self._news()
            if account.images_forwarded != forwarded or not await self._came(news, until):
                return {**status, "trouble": self._trouble}

    async def retire(self) -> Account:
        """Begin no new step; returns what was counted once the running one is done."""
        with self._changed:
            self._retired = True
        for _ in range(int(_RETIRE_S / 0.05)):
            if self._busy is None:
                break
            await asyncio.sleep(0.05)
        return replace(self._account)

    def _news(self) -> asyncio.Future[None]:
        """Comes when the teacher has ended a step; to be made with the lock held."""
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(news)
        return news

    async def _came(self, news: asyncio.Future[None], until: float) -> bool:
        done, _ = await asyncio.wait([news], timeout=until - asyncio.get_running_loop().time())
        with self._changed:
            self._waiting.discard(news)
        return bool(done)

    # --- the teacher's thread ---------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._teacher = self._make_teacher()
        except Exception:
            # Said to the first student that asks, if it fails again then.
            logger.exception("the teacher could not be made")
        while True:
            with self._changed:
                while (step := self._next()) is None:
                    self._changed.wait(_LOOK_S)
                self._busy = (step, time.monotonic())
            try:
                self._compute(step)
            except Exception as error:
                logger.exception("the teacher failed at step %d", step)
                with self._changed:
                    self._failed[step] = f"the teacher failed at step {step}: {type(error).__name__}: {error}"
                    self._trouble = "".join(traceback.format_exception(error))
            with self._changed:
                self._busy = None
                self._wake()

    def _next(self) -> int | None:
        """The most urgent step that is not there; drops those nobody will ask for."""
        now = time.monotonic()
        for step in [step for step in self._refs if not self._window.is_kept(step, now)]:
            del self._refs[step]
        if self._retired:
            return None
        done = {*self._refs, *self._failed}
        return next((step for step in self._window.wanted(now) if step not in done), None)

    def _compute(self, step: int) -> None:
        import ray

        if self._teacher is None:
            self._teacher = self._make_teacher()
        before = self._teacher.images_forwarded
        bundle = dict(self._teacher(step))
        ref = ray.put(bundle)
        size = sum(array.nbytes for array in bundle.values())
        with self._changed:
            self._refs[step] = ref
            self._account.images_per_step = self._teacher.images_per_step
            self._account.computed(step, self._teacher.images_forwarded - before, size)

    def _wake(self) -> None:
        for news in self._waiting:
            news.get_loop().call_soon_threadsafe(_settle, news)
        self._waiting.clear()


def _settle(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)
