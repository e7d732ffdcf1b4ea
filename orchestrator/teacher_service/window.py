"""Which steps the teacher computes and keeps, as a pure function of what the students asked for and when.

Students stay within a window of each other, so that each step is computed once and memory is bounded: a step is
handed out only when it is less than `window` steps ahead of the slowest student that counts. One that is not heard
of for a while, or is far behind, does not count; it gets its steps when it asks, computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# In windows. Waiting for a student that fell back costs the others the gap once; not waiting costs the teacher
# the rest of the run a second time.
_FAR = 16


@dataclass
class _StudentProgress:
    step: int
    heard: float
    since: float  # when it first asked for `step`


class Window:
    """The students in play and what they need. Times are seconds on any one clock.

    Args:
        students: who is in play → its first step, for which it counts before it has asked; None: unknown, and it
            does not count until it asks.
        num_steps: steps 0 … num_steps-1 exist.
        window: steps ahead of the slowest, at least 2 so that the teacher works while students do.
        patience_s: a student not heard of for so long does not count, and none is held on one step for longer.
        now: the time.
    """

    def __init__(
        self, students: Mapping[str, int | None], num_steps: int, window: int, patience_s: float, now: float
    ) -> None:
        assert window >= 2, window
        self._num_steps, self._window, self._patience_s = num_steps, window, patience_s
        self._in_play = set(students)
        self._seen = {
            name: _StudentProgress(step, now, now) for name, step in students.items() if step is not None
        }

    def request(self, name: str, step: int, now: float) -> bool:
        """`name` asks for `step`; False if it is not in play (any more)."""
        if name not in self._in_play:
            return False
        known = self._seen.get(name)
        since = known.since if known is not None and known.step == step else now
        self._seen[name] = _StudentProgress(step, now, since)
        return True

    def deregister(self, name: str) -> None:
        """`name` is done, failed or stopped: it holds nobody and gets nothing any more."""
        self._in_play.discard(name)
        self._seen.pop(name, None)

    def requested_steps(self, now: float) -> list[int]:
        """Steps to have, the most urgent first: those asked for, longest wait first, then those about to be."""
        counted = sorted(self._counted(now), key=lambda student: student.since)
        asked: list[int] = []
        ahead: set[int] = set()
        for student in counted:
            end = self._end(student, counted)
            if student.step < end or now - student.since > self._patience_s:
                asked.append(student.step)
            ahead.update(range(student.step, end))
        return list(dict.fromkeys([*asked, *sorted(ahead)]))

    def holder(self, name: str, now: float) -> str | None:
        """The slowest of those because of whom `name` may not have its step yet; None if it may."""
        student = self._seen.get(name)
        if student is None:
            return None
        counted = self._counted(now)
        if student.step < self._end(student, counted):
            return None
        slowest = min(self._near(student, counted), key=lambda other: other.step)
        return next((known for known, other in self._seen.items() if other is slowest), None)

    def is_kept(self, step: int, now: float) -> bool:
        """Whether some student may still ask for `step`; one of its workers may be a step behind the others."""
        return any(student.step - 1 <= step < student.step + self._window for student in self._counted(now))

    def _counted(self, now: float) -> list[_StudentProgress]:
        return [student for student in self._seen.values() if now - student.heard <= self._patience_s]

    def _end(self, student: _StudentProgress, counted: list[_StudentProgress]) -> int:
        """The first step that `student` may not have yet, because of those a little behind it."""
        near = min(other.step for other in self._near(student, counted))
        return min(near + self._window, self._num_steps)

    def _near(self, student: _StudentProgress, counted: list[_StudentProgress]) -> list[_StudentProgress]:
        """Those that `student` waits for: not far behind it; itself among them."""
        far = _FAR * self._window
        return [other for other in (student, *counted) if 0 <= student.step - other.step <= far]
