"""How many devices each part of a distillation gets, so that no part waits for another. Pure: no clocks, no Ray.

A step costs the teacher `step_s` on one actor, and n actors give n steps in that time. A student's step takes as
long as its worker with most blocks. All students follow the same steps within a window, so the stage goes at the
pace of its slowest part: max(C_T / n_T, max_i C_i(W_i)).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from orchestrator.capacity.contention import Busy, least_s, shared_s
from orchestrator.errors import UserError


@dataclass(frozen=True)
class TeacherCost:
    """What a step costs the teacher: `step_s` seconds on one actor, which takes `devices` devices."""

    step_s: float
    devices: int = 1

    @property
    def work_s(self) -> float:
        """Device-seconds of a step."""
        return self.step_s * self.devices

    def actors_for(self, limit_s: float) -> int:
        """The minimum number of actors that give a step every `limit_s` seconds."""
        actors = max(1, math.ceil(self.step_s / limit_s) - 1)
        while self.step_s / actors > limit_s:
            actors += 1
        return actors


@dataclass(frozen=True)
class StudentCost:
    """What a step costs a student.

    Attributes:
        num_blocks: of a step; a block is not divided.
        block_s: seconds of one block, forward and backward.
        fixed_s: seconds of a step besides its blocks: optimizer, EMA.
        exchange_s: seconds more as soon as there is a second worker.
        steps: that it still has to do.
        min_workers: workers that its weights, gradients and moments need, or its config asks for.
        max_workers: workers that it may have; None: no limit.
    """

    name: str
    num_blocks: int
    block_s: float
    fixed_s: float = 0.0
    exchange_s: float = 0.0
    steps: int = 1
    min_workers: int = 1
    max_workers: int | None = None

    @property
    def work_s(self) -> float:
        """Device-seconds of a step on one device."""
        return self.fixed_s + self.num_blocks * self.block_s

    def step_s(self, workers: int) -> float:
        """Seconds of a step on `workers` devices: of the worker with most blocks, ceil(blocks / workers)."""
        slots = -(-self.num_blocks // workers)
        return self.fixed_s + (self.exchange_s if workers > 1 else 0.0) + slots * self.block_s

    def useful(self) -> tuple[int, ...]:
        """Worker counts worth having, ascending: with any other one, some worker would only wait."""
        return _useful(
            self.num_blocks, self.min_workers, self.max_workers or max(self.num_blocks, self.min_workers)
        )

    def workers_for(self, limit_s: float) -> int | None:
        """The minimum number of workers whose step takes at most `limit_s` seconds; None if no number does."""
        return next((workers for workers in self.useful() if self.step_s(workers) <= limit_s), None)

    def thriftiest_for(self, limit_s: float) -> int | None:
        """Of those whose step takes at most `limit_s` seconds, the number that costs least device-seconds."""
        able = [workers for workers in self.useful() if self.step_s(workers) <= limit_s]
        return min(able, key=lambda workers: (workers * self.step_s(workers), workers), default=None)


@dataclass(frozen=True)
class DeviceSplit:
    """Who gets how many devices.

    Attributes:
        devices: that there are.
        teachers: teacher actors.
        workers: by student.
        step_s: predicted seconds of a step of the whole stage.
        bound_s: the same if all work could be divided at will and nobody waited: (C_T + ΣC_i) / devices.
        own_s: by part, `teacher` and students: how often it could give a step if it never waited.
        used: devices that a part has; the others are left over.
        shared: the parts' processes share devices, as on a laptop with fewer cores than processes.
    """

    devices: float
    teachers: int
    workers: Mapping[str, int]
    step_s: float
    bound_s: float
    own_s: Mapping[str, float]
    used: float
    shared: bool = False

    @property
    def eta(self) -> float:
        """Bound ÷ predicted; 1 is perfect."""
        return self.bound_s / self.step_s

    @property
    def leftover(self) -> float:
        """Devices that would not make it faster."""
        return self.devices - self.used


def split(
    teacher: TeacherCost, students: Sequence[StudentCost], devices: float, *, share: bool = False
) -> DeviceSplit:
    """The split with the shortest step; of those as fast, the one with the smallest number of workers.

    Exact: what a part needs for a step time only grows as that falls, and the best step time is one of the
    parts' own, of which there are few.

    Args:
        teacher: the teacher's cost.
        students: who is to train.
        devices: accelerators, or cores; a fraction counts only where parts may share.
        share: whether processes may share a device (cores of a laptop). The split is then the one with the
            smallest `least_s`; its step is longer, as the parts stand in each other's way.

    Raises:
        UserError: fewer devices than the parts need at least.
        ValueError: no students, or a cost that is not above 0.
    """
    if not students or teacher.step_s <= 0 or any(student.block_s <= 0 for student in students):
        raise ValueError("a split needs students, and costs above 0")
    if share:
        return _share(teacher, students, devices)
    least = least_devices(teacher, students)
    if devices < least:
        parts = f"the teacher and {len(students)} student{'s' if len(students) > 1 else ''}"
        raise UserError(
            f"{devices:g} devices are too few: {parts} need at least {least}",
            where=", ".join(f"{name} {number}" for name, number in _least(teacher, students).items()),
            hint=f"give at least {least} devices, or remove students",
        )
    budget = math.floor(devices)
    times = _times(teacher, students, (budget - least) // teacher.devices + 1)
    at = bisect_left(times, True, key=lambda limit_s: _need(teacher, students, limit_s) <= budget)
    workers = {student.name: student.workers_for(times[at]) or 0 for student in students}
    return predicted(teacher, students, devices, teacher.actors_for(times[at]), workers)


def predicted(
    teacher: TeacherCost,
    students: Sequence[StudentCost],
    devices: float,
    actors: int,
    workers: Mapping[str, int],
    *,
    shared: bool = False,
) -> DeviceSplit:
    """What a given split gives: so many teacher actors, and workers by student.

    Where processes share devices, that is more than all work over all devices: see `shared_s`.
    """
    learning = _learning(students, workers)
    own = {"teacher": teacher.step_s / actors, **{name: part.seconds for name, part in learning.items()}}
    step_s = max(own.values())
    used: float = teacher.devices * actors + sum(workers.values())
    if shared:
        step_s = shared_s(Busy(teacher.step_s, teacher.devices), actors, learning, devices)
        used = min(used, devices)
    bound_s = (teacher.work_s + sum(student.work_s for student in students)) / devices
    return DeviceSplit(devices, actors, workers, step_s, bound_s, own, used, shared)


def least_devices(teacher: TeacherCost, students: Sequence[StudentCost]) -> int:
    """Devices without which the parts do not fit."""
    return sum(_least(teacher, students).values())


@dataclass(frozen=True)
class Phase:
    """Steps during which the same students train."""

    steps: int
    split: DeviceSplit

    @property
    def seconds(self) -> float:
        """On the clock."""
        return self.steps * self.split.step_s


def schedule(
    teacher: TeacherCost, students: Sequence[StudentCost], devices: float, *, share: bool = False
) -> list[Phase]:
    """The whole stage: a new split each time that a student has done its steps.

    The window keeps students at about the same step, so one with fewer steps ends earlier, whatever it has, and
    each phase is best with its own shortest step.

    Raises:
        UserError: see :func:`split`.
    """
    phases, done = [], 0
    for steps in sorted({student.steps for student in students}):
        active = [student for student in students if student.steps >= steps]
        phases.append(Phase(steps - done, split(teacher, active, devices, share=share)))
        done = steps
    return phases


def device_hours(phases: Sequence[Phase]) -> float:
    """Device-hours of a whole stage, of the devices in use."""
    return sum(phase.seconds * phase.split.used for phase in phases) / 3600


def separate_hours(teacher: TeacherCost, students: Sequence[StudentCost]) -> float:
    """Device-hours if each student were trained by itself, with a teacher of its own and nobody ever waiting."""
    return sum(student.steps * (teacher.work_s + student.work_s) for student in students) / 3600


def with_steps(students: Sequence[StudentCost], left: Mapping[str, int]) -> list[StudentCost]:
    """The students that have steps left, and how many."""
    return [
        replace(student, steps=left[student.name]) for student in students if left.get(student.name, 0) > 0
    ]


# --- within ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _useful(num_blocks: int, min_workers: int, max_workers: int) -> tuple[int, ...]:
    counts = {-(-num_blocks // slots) for slots in range(1, num_blocks + 1)}
    return tuple(sorted({min(max_workers, max(min_workers, count)) for count in counts}))


def _least(teacher: TeacherCost, students: Sequence[StudentCost]) -> dict[str, int]:
    return {"teacher": teacher.devices, **{student.name: student.min_workers for student in students}}


def _times(teacher: TeacherCost, students: Sequence[StudentCost], max_actors: int) -> list[float]:
    """Every step time that one of the parts can have, ascending, down to the one that no number of workers beats."""
    own = {student.step_s(workers) for student in students for workers in student.useful()}
    floor = max(min(student.step_s(workers) for workers in student.useful()) for student in students)
    own |= {teacher.step_s / actors for actors in range(1, max_actors + 1)}
    return sorted(time for time in own | {floor} if time >= floor)


def _need(teacher: TeacherCost, students: Sequence[StudentCost], limit_s: float) -> float:
    need: float = teacher.devices * teacher.actors_for(limit_s)
    for student in students:
        need += student.workers_for(limit_s) or math.inf
    return need


def _share(teacher: TeacherCost, students: Sequence[StudentCost], devices: float) -> DeviceSplit:
    if devices <= 0:
        raise UserError(f"{devices:g} devices are too few", hint="give more devices, or a fraction of one")
    # More actors than whole devices would only take turns.
    most = max(1, math.floor(devices))
    ways = [
        (
            min(teacher.actors_for(limit_s), most),
            {student.name: student.thriftiest_for(limit_s) or 0 for student in students},
        )
        for limit_s in _times(teacher, students, most)
    ]

    def least(actors: int, workers: Mapping[str, int]) -> float:
        # Of n actors each is at a step of its own, for n steps' time.
        teachers = Busy(teacher.step_s / actors, teacher.devices * actors)
        return least_s({"teacher": teachers, **_learning(students, workers)}, devices)

    # What the parts cost each other is left out of the choice: it takes much longer to compute.
    actors, workers = min(ways, key=lambda way: (least(*way), way[0] + sum(way[1].values())))
    return predicted(teacher, students, devices, actors, workers, shared=True)


def _learning(students: Sequence[StudentCost], workers: Mapping[str, int]) -> dict[str, Busy]:
    """The students' processes, and how long each is busy in a step."""
    return {
        student.name: Busy(student.step_s(workers[student.name]), workers[student.name])
        for student in students
    }
