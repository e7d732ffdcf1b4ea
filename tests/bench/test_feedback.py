"""The simulation behind `python -m bench feedback`: against closed forms and step by step; nothing is timed."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.capacity.allocate import StudentCost, TeacherCost, split
from orchestrator.simulation.costs import StageCosts
from orchestrator.simulation.trace import Machine, Trace, TraceEvent, always

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import feedback
from bench._split_rules import Feedback, Planner, mistaken
from bench._splits import TEACHER, Case, Change, Counts, Seen, changes, limit_s, play

STUDENTS = (StudentCost("a", 8, 1.0, fixed_s=0.1, steps=400), StudentCost("b", 8, 0.3, steps=400))
CASE = Case("test", TeacherCost(6.0), STUDENTS, always(1, 8, 0.0))


class Fixed:
    """Always the same split, but `then` after the first look."""

    look_s, settle_s = 50.0, 0.0

    def __init__(self, first: Counts, then: Counts | None = None) -> None:
        self.first, self.then = first, then
        self.seen: list[Seen] = []

    def changed(self, devices: int, steps_left: Mapping[str, int], present: Counts) -> Counts:
        return {part: self.first[part] for part in (TEACHER, *steps_left)}

    def looked(self, seen: Seen, present: Counts) -> Counts | None:
        self.seen.append(seen)
        then, self.then = self.then, None
        return then


def step_by_step(case: Case, counts: Counts, window: int) -> float:
    """When the last student is done, if each actor makes a step at a time and nobody is ever restarted."""
    made: list[float] = []
    done: dict[str, list[float]] = {student.name: [] for student in case.students}
    for step in range(max(student.steps for student in case.students)):
        free = made[step - counts[TEACHER]] if step >= counts[TEACHER] else 0.0
        room = max(times[step - window] for times in done.values()) if step >= window else 0.0
        made.append(max(free, room) + case.teacher.step_s)
        for student in case.students:
            times = done[student.name]
            begins = max(made[step], times[-1] if times else 0.0)
            times.append(begins + student.step_s(counts[student.name]))
    return max(times[-1] for times in done.values())


@pytest.mark.parametrize(
    "counts", [{TEACHER: 2, "a": 4, "b": 2}, {TEACHER: 4, "a": 2, "b": 2}, {TEACHER: 1, "a": 4, "b": 1}]
)
def test_flow_takes_as_long_as_single_steps(counts: Counts) -> None:
    """But for the first steps, when groups start and the teacher makes its first one."""
    window = max(4, split(CASE.teacher, STUDENTS, 8).teachers + 1)
    expected = step_by_step(CASE, counts, window)
    assert play(CASE, Fixed(counts)).seconds == pytest.approx(expected, abs=2 * CASE.teacher.step_s)


def test_who_waits_is_seen() -> None:
    rule = Fixed({TEACHER: 2, "a": 4, "b": 2})
    play(CASE, rule)
    seen = rule.seen[-2]
    # A step takes the teacher 3 s, `a` 2.1 s and `b` 1.2 s.
    assert seen.pace == pytest.approx(1 / 3)
    assert seen.busy == pytest.approx({TEACHER: 1.0, "a": 0.7, "b": 0.4})


def test_a_change_of_the_split_costs_its_restart() -> None:
    """The slowest student is restarted on one device less, which makes no step longer: two blocks of 8 on each."""
    first, then = {TEACHER: 1, "a": 5, "b": 2}, {TEACHER: 1, "a": 4, "b": 2}
    case = replace(CASE, teacher=TeacherCost(0.1), costs=StageCosts(start_s=30.0))
    undisturbed = play(case, Fixed(first)).seconds
    changed = play(case, Fixed(first, then))
    assert changed.changes == 1
    assert changed.seconds == pytest.approx(undisturbed + case.restart_s, abs=0.1)


def test_what_was_not_saved_is_done_again() -> None:
    """A machine that goes without a notice takes steps with it, one that has announced it does not."""
    machines = tuple(Machine(str(number), "", 1, ((0.0, 0.0),)) for number in range(4))
    here = [TraceEvent(0.0, "up", number) for number in range(4)]
    down, notice = TraceEvent(100.5, "down", 1), TraceEvent(100.5, "notice", 1, 130.0)
    back = TraceEvent(200.0, "up", 1)
    seconds = []
    for events in ([down, back], [notice, TraceEvent(130.0, "down", 1), back]):
        case = replace(CASE, trace=Trace("", "", machines, tuple(here + events)))
        seconds.append(play(case, Fixed({TEACHER: 1, "a": 1, "b": 1})).seconds)
        assert seconds[-1] > limit_s(case)
    assert seconds[0] > seconds[1]


def test_machines_count_from_warm_to_notice() -> None:
    machines = tuple(Machine(str(number), "", 2, ((0.0, 0.0),)) for number in range(2))
    events = (
        TraceEvent(0.0, "up", 0),
        TraceEvent(50.0, "up", 1),
        TraceEvent(55.0, "down", 1),  # before it was ready
        TraceEvent(70.0, "up", 1),
        TraceEvent(90.0, "notice", 0, 100.0),
        TraceEvent(100.0, "down", 0),
    )
    assert changes(Trace("", "", machines, events), warm_s=10.0) == [
        Change(0.0, come=((0, 0), (0, 1))),
        Change(80.0, come=((1, 0), (1, 1))),
        Change(90.0, go=((0, 0), (0, 1))),
    ]


def test_the_planner_with_true_costs_is_at_the_limit() -> None:
    case = replace(CASE, students=tuple(replace(student, steps=20_000) for student in STUDENTS))
    ratio = play(case, Planner(case.teacher, case.students)).seconds / limit_s(case)
    assert ratio == pytest.approx(1.0, abs=1e-3)


def test_feedback_finds_the_best_split() -> None:
    case = replace(CASE, students=tuple(replace(student, steps=20_000) for student in STUDENTS))
    rule = Feedback({student.name: student.num_blocks for student in STUDENTS})
    assert play(case, rule).seconds / limit_s(case) == pytest.approx(1.0, abs=3e-3)


def test_feedback_goes_back_from_a_move_that_made_it_slower() -> None:
    rule = Feedback({"a": 8, "b": 8})
    start = rule.changed(8, {"a": 100, "b": 100}, {})
    moved = rule.looked(Seen({TEACHER: 1.0, "a": 0.4, "b": 0.3}, 1.0, 1000), start)
    assert moved is not None
    assert moved[TEACHER] == start[TEACHER] + 1
    assert rule.looked(Seen({TEACHER: 1.0, "a": 0.4, "b": 0.3}, 0.9, 1000), moved) == start
    again = rule.looked(Seen({TEACHER: 1.0, "a": 0.4, "b": 0.3}, 1.0, 1000), start)
    assert again != moved, "it remembers"


def test_errors_are_as_large_as_said_and_each_part_has_its_own() -> None:
    teacher, students = mistaken(TeacherCost(1.0), STUDENTS, (0.02, 0.1), random.Random(3))
    factors = [
        teacher.step_s,
        *(one.block_s / true.block_s for one, true in zip(students, STUDENTS, strict=True)),
    ]
    assert all(0.02 <= abs(factor - 1) <= 0.1 for factor in factors)
    assert len(set(factors)) == 3


def test_the_worst_group_decides() -> None:
    (first, *_), seconds = feedback.cases([0], (8,)), {feedback.PLANNER: 100.0, feedback.TRUE: 90.0}
    arms = {feedback.MANY: 100.0, feedback.BOTH: 100.0}

    def result(devices: str, took: float) -> feedback.Result:
        times = {**seconds, **arms, feedback.FEEDBACK: took}
        return feedback.Result(replace(first, length=devices), 80.0, times, dict.fromkeys(times, 1))

    claim = feedback.claim([result("10 min", 110.0), result("10 min", 104.0), result("24 h", 90.0)])
    assert claim.figure == pytest.approx(1.07)
    assert claim.met is False
    assert claim.arms["steady, 24 h, calm: feedback"].median == pytest.approx(90 / 80)
    assert feedback.claim([result("24 h", 90.0)]).met is True
