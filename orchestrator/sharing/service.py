"""One teacher's results, computed once a step and handed to every student through the Ray object store.

The teacher is frozen, so what it says about step t is a function of t alone: it can run ahead without being
stale, and a step that was thrown away can be computed again. A bounded window keeps memory bounded: a step is
handed out only when it is less than `window` steps ahead of the slowest student.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

Bundle = Mapping[str, NDArray[Any]]


class StepTeacher(Protocol):
    """Computes all that students need for one step. `images_per_step` counts images, not crops."""

    images_per_step: int
    images_forwarded: int

    def __call__(self, step: int) -> Bundle: ...


@dataclass(frozen=True)
class Stats:
    """What was computed and handed out so far."""

    images_forwarded: int
    images_needed: int
    bytes_per_image: float
    steps_recomputed: int

    @property
    def teacher_forwards_per_image(self) -> float:
        """1.0 when every image of every step went through the teacher once, however many students there are."""
        return self.images_forwarded / self.images_needed if self.images_needed else 0.0


class ShareActor:
    """The Ray actor that owns the teacher; its methods block, so it runs with `max_concurrency` threads.

    Args:
        make_teacher: builds the teacher in this process.
        students: who will ask → the step each begins with (later than 0 when it resumes). All of them count
            for the window until they leave, also before their first question.
        num_steps: steps 0 … num_steps-1 exist.
        window: steps kept at once, at least 2 so that the teacher works while students do.
    """

    def __init__(
        self,
        make_teacher: Callable[[], StepTeacher],
        students: Mapping[str, int],
        num_steps: int,
        window: int,
    ) -> None:
        assert window >= 2, window
        self._num_steps, self._window = num_steps, window
        self._progress = dict(students)
        self._refs: dict[int, Any] = {}
        self._computed: set[int] = set()
        self._forwarded, self._recomputed, self._bytes = 0, 0, 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._teacher: StepTeacher | None = None
        threading.Thread(target=self._work, args=(make_teacher,), daemon=True).start()

    def step(self, student: str, step: int) -> list[Any]:
        """A reference to the bundle of `step`, in a list so that Ray does not resolve it; waits until there is one.

        Raises:
            RuntimeError: the teacher failed.
        """
        with self._changed:
            self._progress[student] = step
            self._changed.notify_all()
            self._changed.wait_for(lambda: step in self._refs or self._error is not None)
            if step not in self._refs:
                raise RuntimeError(f"the teacher failed: {self._error}") from self._error
            return [self._refs[step]]

    def leave(self, student: str) -> None:
        """This student is done, failed or stopped: nobody waits for it any more."""
        with self._changed:
            self._progress.pop(student, None)
            self._changed.notify_all()

    def stats(self) -> Stats:
        """Counters so far."""
        with self._changed:
            teacher, steps = self._teacher, len(self._computed)
            if teacher is None:
                return Stats(0, 0, 0.0, 0)
            needed = steps * teacher.images_per_step
            return Stats(self._forwarded, needed, self._bytes / needed if needed else 0.0, self._recomputed)

    def _work(self, make_teacher: Callable[[], StepTeacher]) -> None:
        try:
            self._teacher = make_teacher()
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._next() is not None)
                    step = self._next()
                    assert step is not None
                self._compute(step)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The earliest step of the window that is not there; drops what is behind the window."""
        if not self._progress:
            return None
        first = min(self._progress.values())
        for step in [step for step in self._refs if step < first]:
            del self._refs[step]
        window = range(first, min(first + self._window, self._num_steps))
        return next((step for step in window if step not in self._refs), None)

    def _compute(self, step: int) -> None:
        import ray

        assert self._teacher is not None
        bundle = self._teacher(step)
        ref = ray.put(dict(bundle))
        with self._changed:
            self._refs[step] = ref
            self._forwarded = self._teacher.images_forwarded
            self._recomputed += step in self._computed
            if step not in self._computed:
                self._bytes += sum(array.nbytes for array in bundle.values())
            self._computed.add(step)
            self._changed.notify_all()
