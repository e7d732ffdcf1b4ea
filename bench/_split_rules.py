"""Two rules that split the devices of a distillation: the planner's predictions, and who waits for whom."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bench._splits import TEACHER, Counts, Rule, Seen, min_devices, scaled
from orchestrator.capacity.allocate import DeviceSplit, StudentCost, TeacherCost, split, with_steps
from orchestrator.capacity.rebalance import _faster, _fits
from orchestrator.errors import UserError


class Planner:
    """What `capacity/rebalance.py` does, on these costs: it never looks at who waits."""

    look_s = settle_s = math.inf

    def __init__(self, teacher: TeacherCost, students: Sequence[StudentCost]) -> None:
        self._teacher, self._students = teacher, students
        self._split: DeviceSplit | None = None
        self._names: tuple[str, ...] = ()

    def changed(self, devices: int, steps_left: Mapping[str, int], present: Counts) -> Counts:
        """See :class:`bench._splits.Rule`."""
        try:
            found = split(self._teacher, with_steps(self._students, steps_left), devices)
        except UserError:
            self._split = None
            return min_devices(list(steps_left), devices)
        names, before = self._names, self._split
        self._names = tuple(steps_left)
        if before is None or names != self._names or not _fits(before, devices) or _faster(found, before):
            self._split = found
        assert self._split is not None
        return {TEACHER: self._split.teachers, **self._split.workers}

    def looked(self, seen: Seen, present: Counts) -> None:
        """Never called."""


def mistaken(
    teacher: TeacherCost, students: Sequence[StudentCost], off: tuple[float, float], draw: random.Random
) -> tuple[TeacherCost, list[StudentCost]]:
    """Costs of which each part's is off by itself, up or down, by a share drawn between these two."""
    factors = [1 + draw.choice((-1, 1)) * draw.uniform(*off) for _ in range(1 + len(students))]
    return replace(teacher, step_s=teacher.step_s * factors[0]), [
        scaled(student, factor) for student, factor in zip(students, factors[1:], strict=True)
    ]


@dataclass
class Feedback:
    """Knows no costs: moves devices from who waits most to who is waited for.

    It knows how many blocks a step has, so that it gives no student a number of devices that helps nobody. A part
    that computes in a share b of the time on n devices would need b · n / m on m: a move is made if neither of the two
    parts would be as busy after it as the busiest is now, by `gain`. Splits that were tried are kept, by
    devices and students; it goes back to the fastest if a move made it slower.

    Attributes:
        num_blocks: of a step, by student.
        moves: at a time.
        first: makes the first split; without it all parts get as many devices.
        restart_s: what a restart was seen to take; a move must promise to save twice that in the rest of the run.
        longest_s: while nothing changes, each look is twice as long as the one before, up to this.
    """

    num_blocks: Mapping[str, int]
    settle_s: float = 3.0
    look_s: float = 10.0
    gain: float = 0.03
    restart_s: float = 2.0
    longest_s: float = 600.0
    moves: int = 1
    first: Rule | None = None
    _first_look_s: float = 0.0
    _devices: int = 0
    _busy: dict[str, float] = field(default_factory=dict)  # at `_of`
    _of: Counts = field(default_factory=dict)
    _tried: dict[tuple[int, tuple[str, ...]], dict[tuple[int, ...], float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._first_look_s = self.look_s

    def changed(self, devices: int, steps_left: Mapping[str, int], present: Counts) -> Counts:
        """The fastest split that was tried on so many, else the present one with devices given or taken."""
        self._devices, self.look_s = devices, self._first_look_s
        parts = (TEACHER, *steps_left)
        if devices < len(parts):
            return min_devices(list(steps_left), devices)
        if known := self._tried.get((devices, parts)):
            return dict(zip(parts, _fastest(known), strict=True))
        if not all(self._busy.get(part) for part in parts):
            if self.first is not None:
                return self.first.changed(devices, steps_left, present)
            # Nothing was seen yet: as if all had the same to do.
            self._busy, self._of = dict.fromkeys(parts, 1.0), dict.fromkeys(parts, 1)
        counts = {part: max(1, present.get(part, 1)) for part in parts}
        while sum(counts.values()) > devices:
            giver = min(
                (part for part in parts if counts[part] > 1), key=lambda p: self._on(p, counts[p] - 1)
            )
            counts[giver] -= 1
        while (free := devices - sum(counts.values())) > 0:
            taker = max(parts, key=lambda part: self._on(part, counts[part]))
            more = self._next(taker, counts[taker])
            if more is None or more - counts[taker] > free:
                break
            counts[taker] = more
        return counts

    def looked(self, seen: Seen, present: Counts) -> Counts | None:
        """Back, if it became slower; else the next move that promises something."""
        counts = self._better(seen, present)
        self.look_s = self._first_look_s if counts is not None else min(2 * self.look_s, self.longest_s)
        return counts

    def _better(self, seen: Seen, present: Counts) -> Counts | None:
        parts = tuple(present)
        if sum(present.values()) < len(parts) or not all(seen.busy.values()) or seen.pace <= 0:
            return None
        known = self._tried.setdefault((self._devices, parts), {})
        known[tuple(present.values())] = seen.pace
        best = _fastest(known)
        if seen.pace < known[best] * 0.99:
            return dict(zip(parts, best, strict=True))
        self._busy, self._of = dict(seen.busy), present
        counts, before = dict(present), max(seen.busy.values())
        for _ in range(self.moves):
            found = self._move(counts, known, seen.steps_left / seen.pace)
            if found is None:
                break
            counts = found
        after = max(self._on(part, counts[part]) for part in parts)
        return counts if self.moves == 1 or after < before * (1 - self.gain) else None

    def _move(
        self, counts: Mapping[str, int], known: Mapping[tuple[int, ...], float], left_s: float
    ) -> dict[str, int] | None:
        taker = max(counts, key=lambda part: self._on(part, counts[part]))
        busiest, more = self._on(taker, counts[taker]), self._next(taker, counts[taker])
        if more is None:
            return None
        found, after = {**counts, taker: more}, self._on(taker, more)
        while sum(found.values()) > self._devices:
            givers = [part for part in found if part != taker and found[part] > 1]
            giver = min(givers, key=lambda part: self._on(part, found[part] - 1), default=None)
            if giver is None:
                return None
            found[giver] -= 1
            after = max(after, self._on(giver, found[giver]))
        worth = after < busiest * (1 - self.gain) and (1 - after / busiest) * left_s > 2 * self.restart_s
        return found if worth and tuple(found.values()) not in known else None

    def _on(self, part: str, devices: int) -> float:
        """How busy it would be on so many, at the pace at which it was seen."""
        return self._busy[part] * self._slots(part, devices) / self._slots(part, self._of[part])

    def _slots(self, part: str, devices: int) -> float:
        return 1 / devices if part == TEACHER else -(-self.num_blocks[part] // devices)

    def _next(self, part: str, devices: int) -> int | None:
        """The next number of devices that makes it faster; None if none does."""
        if part == TEACHER:
            return devices + 1
        slots = -(-self.num_blocks[part] // devices)
        return None if slots == 1 else -(-self.num_blocks[part] // (slots - 1))


def _fastest(known: Mapping[tuple[int, ...], float]) -> tuple[int, ...]:
    return max(known, key=lambda one: known[one])
