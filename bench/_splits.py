"""A distillation played on machines that come and go, with a rule that splits the devices: no clocks, no Ray.

Work flows: a teacher of n actors makes n / C_T steps a second, a student on W devices does 1 / C(W), no student is past
the teacher, and the teacher is at most a window ahead of the slowest student. Between two moments at which one of these
bounds begins or ceases to hold, all speeds are constant, so time jumps from one to the next. What a change of the split
costs is what `orchestrator/simulation/costs.py` says.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

from orchestrator.capacity.allocate import StudentCost, TeacherCost, least_devices, split
from orchestrator.simulation.costs import StageCosts
from orchestrator.simulation.trace import Trace
from orchestrator.training.checkpoint.interval import PRIOR_MTBF_S, checkpoint_interval

TEACHER = "teacher"
# As in `elastic/scaling_rules.py`: the share of the time that growing may take, and what it must bring.
_RESIZE_SHARE, _RESIZE_GAIN = 0.1, 2.0
_LEAST_WINDOW = 4
_NEAR = 1e-6
_MINUTE_S = 60.0
Device = tuple[int, int]  # machine, place on it
Counts = Mapping[str, int]  # devices by part


@dataclass(frozen=True)
class Case:
    """A distillation and its machines; the costs are the true ones.

    Attributes:
        costs: of starting groups and actors, checkpoints and new machines.
        drift: each part's steps take exp(drift · a normal number) times as long, drawn again for each minute.
        seed: of the drift.
    """

    name: str
    teacher: TeacherCost
    students: tuple[StudentCost, ...]
    trace: Trace
    costs: StageCosts = field(default_factory=StageCosts)
    drift: float = 0.0
    seed: int = 0

    @property
    def devices(self) -> int:
        """When all machines are there."""
        return sum(machine.slots for machine in self.trace.machines)

    @property
    def restart_s(self) -> float:
        """A group's planned end, the next one's start, and what its first step takes longer."""
        return self.costs.stall_s + self.costs.start_s + self.costs.restore_s + self.costs.first_step_s

    def slower(self, part: str, minute: int) -> float:
        """How many times as long as its cost says a part's step takes in that minute."""
        return _drawn(self.seed, part, minute, self.drift) if self.drift else 1.0


@lru_cache(maxsize=65_536)
def _drawn(seed: int, part: str, minute: int, drift: float) -> float:
    return math.exp(drift * random.Random(f"{seed}/{part}/{minute}").gauss(0, 1))


@dataclass(frozen=True)
class Change:
    """Devices that come or go at a time; `lost`: they go without a notice."""

    at: float
    come: tuple[Device, ...] = ()
    go: tuple[Device, ...] = ()
    lost: bool = False


@dataclass(frozen=True)
class Seen:
    """What waiting says: the share of the time in which each part computed, steps a second, and steps left."""

    busy: Mapping[str, float]
    pace: float
    steps_left: float


class Rule(Protocol):
    """Says how many devices each part gets."""

    look_s: float  # it looks at who waits for so long; inf: never
    settle_s: float  # after a change, before it looks

    def changed(self, devices: int, steps_left: Mapping[str, int], present: Counts) -> Counts:
        """Devices came or went, or a student is done."""

    def looked(self, seen: Seen, present: Counts) -> Counts | None:
        """It has looked; None: nothing to change."""


@dataclass(frozen=True)
class Played:
    """How it went: seconds in all, and how often a group was restarted or a teacher actor started."""

    seconds: float
    changes: int


def changes(trace: Trace, warm_s: float) -> list[Change]:
    """When devices can be used: `warm_s` after their machine came, or at once for the first ones, until its notice."""
    found: list[Change] = []
    coming: dict[int, float] = {}
    there: set[int] = set()
    for event in [*trace.events, None]:
        now = math.inf if event is None else event.at
        for machine, at in sorted(coming.items(), key=lambda item: item[1]):
            if at <= now:
                found.append(Change(at, come=_places(trace, machine)))
                there.add(machine)
                del coming[machine]
        if event is None:
            break
        if event.kind == "up":
            coming[event.machine] = now + (warm_s if now else 0.0)
            continue
        coming.pop(event.machine, None)
        if event.machine in there:
            there.discard(event.machine)
            found.append(Change(now, go=_places(trace, event.machine), lost=event.kind == "down"))
    return found


def limit_s(case: Case) -> float:
    """Seconds with the best split at each moment, from true costs, where a change costs nothing."""
    left = {student.name: float(student.steps) for student in case.students}
    now, devices, waiting = 0.0, 0, changes(case.trace, case.costs.warm_s)
    while any(left.values()):
        while waiting and waiting[0].at <= now + _NEAR:
            change = waiting.pop(0)
            devices += len(change.come) - len(change.go)
        until = waiting[0].at if waiting else math.inf
        active = tuple(student for student in case.students if left[student.name] > 0)
        if devices < least_devices(case.teacher, active):
            if not waiting:
                raise RuntimeError(f"{case.name}: the trace ends with too few devices")
            now = until
            continue
        if case.drift:
            minute = math.floor(now / _MINUTE_S + _NEAR)
            until = min(until, (minute + 1) * _MINUTE_S)
            step_s = _drifted_step_s(case, active, devices, minute)
        else:
            step_s = best_step_s(case.teacher, active, devices)
        steps = min((until - now) / step_s, min(left[student.name] for student in active))
        now += steps * step_s
        for student in active:
            rest = left[student.name] - steps
            left[student.name] = rest if rest > _NEAR else 0.0
    return now


@lru_cache(maxsize=4096)
def best_step_s(teacher: TeacherCost, students: tuple[StudentCost, ...], devices: int) -> float:
    """Seconds of a step of the best split."""
    return split(teacher, students, devices).step_s


def _drifted_step_s(case: Case, active: Sequence[StudentCost], devices: int, minute: int) -> float:
    teacher = replace(case.teacher, step_s=case.teacher.step_s * case.slower(TEACHER, minute))
    return split(teacher, [scaled(one, case.slower(one.name, minute)) for one in active], devices).step_s


def scaled(student: StudentCost, factor: float) -> StudentCost:
    """A student whose steps take `factor` times as long."""
    parts = student.block_s * factor, student.fixed_s * factor, student.exchange_s * factor
    return replace(student, block_s=parts[0], fixed_s=parts[1], exchange_s=parts[2])


def min_devices(students: Sequence[str], devices: int) -> dict[str, int]:
    """One device for each part, as long as there are any."""
    return {part: int(place < devices) for place, part in enumerate((TEACHER, *students))}


def play(case: Case, rule: Rule) -> Played:
    """The whole run.

    Raises:
        RuntimeError: it does not go on any more, and no machine is to come.
    """
    return _Play(case, rule).run()


@dataclass
class _Part:
    """A part's devices: those it computes on, and those it will when it may; a student is away until `resumes_at`."""

    devices: list[Device] = field(default_factory=list)
    coming: list[tuple[float, Device]] = field(default_factory=list)
    resumes_at: float = 0.0
    started_at: float = -math.inf
    began_step: float = 0.0

    def held(self) -> list[Device]:
        return self.devices + [device for _, device in self.coming]


class _Play:
    def __init__(self, case: Case, rule: Rule) -> None:
        self.case, self.rule, self.now, self.minute, self.num_changes = case, rule, 0.0, 0, 0
        self.cost = {student.name: student for student in case.students}
        self.done = dict.fromkeys(self.cost, 0.0)
        self.made = 0.0
        self.parts = {TEACHER: _Part(), **{name: _Part() for name in self.cost}}
        self.there: set[Device] = set()
        self.last_use: dict[Device, bool] = {}  # by a teacher
        self.counts: Counts = dict.fromkeys(self.parts, 0)
        teachers = split(case.teacher, case.students, case.devices).teachers
        self.window = max(_LEAST_WINDOW, teachers + 1)
        self.since, self.since_step = math.inf, 0.0
        self.computed = dict.fromkeys(self.parts, 0.0)

    def run(self) -> Played:
        waiting = changes(self.case.trace, self.case.costs.warm_s)
        while self.done:
            change = waiting[0].at if waiting else math.inf
            until = min(change, self._next_own(), self._next_look())
            left = self._flow(until)
            if left or until == change:
                lost: set[Device] = set()
                while waiting and waiting[0].at <= self.now:
                    one = waiting.pop(0)
                    self.there = (self.there | set(one.come)) - set(one.go)
                    lost |= set(one.go) if one.lost else set()
                if self.done:
                    steps = {name: math.ceil(self.cost[name].steps - at) for name, at in self.done.items()}
                    counts = self.rule.changed(len(self.there), steps, dict(self.counts))
                    self._take_on(counts, lost)
            elif self.now >= self._next_look():
                self._look()
            self._begin()
        return Played(self.now, self.num_changes)

    # --- steps ------------------------------------------------------------------------------------------------

    def _flow(self, until: float) -> bool:
        """Let work flow until then, or until a student is done; whether one is."""
        while self.now < until:
            able = {part: self._able(part) for part in self.parts}
            speed = self._speeds(able)
            seconds = min(until - self.now, self._constant_for(speed))
            if self.case.drift:
                seconds = min(seconds, (self.minute + 1) * _MINUTE_S - self.now)
            if seconds == math.inf:
                raise RuntimeError(f"{self.case.name}: nothing goes on at {self.now:.0f} s")
            for part, now in speed.items():
                if able[part]:
                    self.computed[part] += seconds * now / able[part]
            self.now = until if seconds == until - self.now else self.now + seconds
            self.minute = math.floor(self.now / _MINUTE_S + _NEAR)
            self.made += seconds * speed[TEACHER]
            for name in self.done:
                self.done[name] += seconds * speed[name]
            finished = [name for name, at in self.done.items() if at >= self.cost[name].steps - _NEAR]
            for name in finished:
                del self.done[name], self.parts[name], self.computed[name]
            if finished:
                return True
        return False

    def _able(self, part: str) -> float:
        """Steps a second, if it never waited."""
        state = self.parts[part]
        if part == TEACHER:
            return len(state.devices) / (self.case.teacher.step_s * self.case.slower(part, self.minute))
        if not state.devices or self.now < state.resumes_at:
            return 0.0
        return 1 / (self.cost[part].step_s(len(state.devices)) * self.case.slower(part, self.minute))

    def _speeds(self, able: Mapping[str, float]) -> dict[str, float]:
        slowest = min(self.done.values())
        teacher = able[TEACHER]
        if self.made >= slowest + self.window - _NEAR:
            teacher = min(teacher, *(able[name] for name, at in self.done.items() if at <= slowest + _NEAR))
        speed = {TEACHER: teacher}
        for name, at in self.done.items():
            ahead = at - self.made
            speed[name] = (
                able[name] if ahead < -_NEAR else min(able[name], teacher) if ahead <= _NEAR else 0.0
            )
        return speed

    def _constant_for(self, speed: Mapping[str, float]) -> float:
        """Until a student reaches the teacher or its end, or the teacher reaches a student or the window's end."""
        found, teacher = math.inf, speed[TEACHER]
        for name, at in self.done.items():
            gap, room, closing = self.made - at, at + self.window - self.made, teacher - speed[name]
            if gap > _NEAR and closing < 0:
                found = min(found, gap / -closing)
            if gap < -_NEAR and closing > 0:
                found = min(found, -gap / closing)
            if room > _NEAR and closing > 0:
                found = min(found, room / closing)
            if speed[name] > 0:
                found = min(found, (self.cost[name].steps - at) / speed[name])
        return found

    # --- who has which devices ----------------------------------------------------------------------------------

    def _take_on(self, counts: Counts, lost: set[Device]) -> None:
        self.counts = counts
        for name, part in self.parts.items():
            had, able = len(part.devices), self._able(name)
            fell = bool(lost.intersection(part.devices))
            part.devices = [device for device in part.devices if device in self.there]
            part.coming = [(at, device) for at, device in part.coming if device in self.there]
            while len(part.coming) and len(part.held()) > counts[name]:
                part.coming.pop()
            del part.devices[counts[name] :]
            if len(part.devices) < had and name != TEACHER:
                self._restart(name, able if fell else None)
        held = {device for part in self.parts.values() for device in part.held()}
        free = sorted(self.there - held)
        for name, part in self.parts.items():
            for _ in range(counts[name] - len(part.held())):
                if not free:
                    break
                teaches = name == TEACHER
                # A place that is ready for this kind of process, if there is one.
                device = min(free, key=lambda one: self.last_use.get(one, teaches) != teaches)
                free.remove(device)
                ready = self.last_use.get(device, teaches) == teaches
                self.last_use[device] = teaches
                part.coming.append((self.now + (0.0 if ready else self.case.costs.warm_s), device))
        self.since = math.inf

    def _restart(self, name: str, fell_at: float | None = None) -> None:
        """A student's group ends now; the next one goes on from where it was.

        One that lost a worker, at `fell_at` steps a second, goes on from its newest checkpoint, half an interval old.
        """
        part, costs = self.parts[name], self.case.costs
        again = part.started_at == self.now
        resumes_at = self.now + self.case.restart_s
        if fell_at is not None:
            resumes_at += costs.detect_s
            back = checkpoint_interval(costs.stall_s, PRIOR_MTBF_S) / 2 * fell_at
            self.done[name] -= min(back, self.done[name] - part.began_step)
            # Steps that students have passed are not kept: the teacher makes them again.
            self.made = min(self.made, self.done[name])
        self.num_changes += self.now > 0 and not again
        part.resumes_at = max(resumes_at, part.resumes_at) if again else resumes_at
        part.began_step, part.started_at = self.done[name], self.now

    def _begin(self) -> None:
        """Those begin whose devices are ready."""
        teacher = self.parts[TEACHER]
        ready = [device for at, device in teacher.coming if at <= self.now]
        self.num_changes += len(ready) if self.now > 0 else 0
        teacher.devices += ready
        teacher.coming = [(at, device) for at, device in teacher.coming if at > self.now]
        for name in self.done:
            part = self.parts[name]
            if part.coming and self._grows_at(name) <= self.now:
                part.devices += [device for _, device in part.coming]
                part.coming = []
                self._restart(name)
        if self.since == math.inf and self._next_own() == math.inf:
            self.since = self.now + self.rule.settle_s
            self.computed = dict.fromkeys(self.parts, 0.0)
            self.since_step = math.nan

    def _grows_at(self, name: str) -> float:
        """When its devices are ready, and growing once more takes no more of the time than it may."""
        part, cost = self.parts[name], self.cost[name]
        ready = max(at for at, _ in part.coming)
        if not part.devices or part.started_at == self.now:
            return ready
        now_s, then_s = cost.step_s(len(part.devices)), cost.step_s(len(part.held()))
        if (cost.steps - self.done[name]) * (now_s - then_s) <= _RESIZE_GAIN * self.case.restart_s:
            return math.inf
        return max(ready, part.started_at + self.case.restart_s / _RESIZE_SHARE)

    def _next_own(self) -> float:
        """When a group or an actor begins or resumes next."""
        times = [at for at, _ in self.parts[TEACHER].coming]
        for name in self.done:
            part = self.parts[name]
            times += [part.resumes_at] if part.resumes_at > self.now else []
            times += [self._grows_at(name)] if part.coming else []
        return min(times, default=math.inf)

    # --- looking --------------------------------------------------------------------------------------------------

    def _next_look(self) -> float:
        if math.isnan(self.since_step):
            return self.since
        return self.since + self.rule.look_s

    def _look(self) -> None:
        slowest = min(self.done.values())
        if not math.isnan(self.since_step):
            seconds = self.now - self.since
            busy = {part: computed / seconds for part, computed in self.computed.items()}
            steps_left = max(self.cost[name].steps - at for name, at in self.done.items())
            pace = (slowest - self.since_step) / seconds
            counts = self.rule.looked(Seen(busy, pace, steps_left), dict(self.counts))
            if counts is not None and dict(counts) != dict(self.counts):
                self._take_on(counts, set())
                return
        self.since, self.since_step = self.now, slowest
        self.computed = dict.fromkeys(self.parts, 0.0)


def _places(trace: Trace, machine: int) -> tuple[Device, ...]:
    return tuple((machine, place) for place in range(trace.machines[machine].slots))
