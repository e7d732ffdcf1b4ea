"""The step of processes that share cores: by hand, and against time slices with the coordinator's window."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.capacity.contention import AROUND_CORES, Busy, least_s, shared_s
from orchestrator.teacher_service.window import Window

busy = st.builds(Busy, st.integers(1, 40).map(lambda tenths: tenths / 10), st.integers(1, 3))
students_of = st.dictionaries(st.sampled_from("abcd"), busy, min_size=1)
CORES = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 8.0])


def parts_of(teacher: Busy, actors: int, students: Mapping[str, Busy]) -> dict[str, Busy]:
    return {"teacher": Busy(teacher.seconds / actors, teacher.processes * actors), **students}


@settings(deadline=None)
@given(busy, st.integers(1, 3), students_of, CORES)
def test_never_less_than_no_step_can_do_without(
    teacher: Busy, actors: int, students: dict[str, Busy], cores: float
) -> None:
    least = least_s(parts_of(teacher, actors, students), cores)
    # Within a window of 4 some are a little ahead, so that they have less to do in the steps that are counted.
    assert shared_s(teacher, actors, students, cores) >= least * (1 - 4 / 32)


@settings(deadline=None)
@given(busy, st.integers(1, 3), students_of)
def test_where_there_is_a_core_for_everybody_nobody_waits(
    teacher: Busy, actors: int, students: dict[str, Busy]
) -> None:
    parts = parts_of(teacher, actors, students)
    cores = sum(part.processes for part in parts.values()) + 1.0
    assert shared_s(teacher, actors, students, cores) == pytest.approx(least_s(parts, cores), rel=0.1)


def test_what_is_around_leaves_the_parts_less_than_all_cores() -> None:
    assert least_s({"a": Busy(1.0, 3)}, 2.0) == pytest.approx(3 / (2 - AROUND_CORES))
    assert least_s({"a": Busy(2.0), "b": Busy(0.5)}, 2.0) == 2.0, "no step is shorter than its largest part"
    assert least_s({"a": Busy(1.0)}, 0.2) == pytest.approx(10.0), (
        "at least half of what there is, is for the parts"
    )


def test_students_that_wait_for_the_teacher_start_together_and_hold_it_up() -> None:
    """Three are ready at 0.62 of their speed for 0.5 s of work; then the teacher has a core for what is left of it."""
    speed = (2 - AROUND_CORES) / 3
    found = shared_s(Busy(1.0), 1, {"a": Busy(0.5), "b": Busy(0.5)}, 2)
    assert found == pytest.approx(0.5 / speed + 0.5)


def test_whoever_waits_for_the_slowest_student_takes_turns() -> None:
    """The teacher starts when the slow student has moved, the quick one when the teacher is done: never three."""
    speed = (2 - AROUND_CORES) / 2
    found = shared_s(Busy(0.3), 1, {"slow": Busy(1.2), "quick": Busy(0.6)}, 2)
    assert found == pytest.approx(0.9 / speed + 0.3)


def test_more_teachers_give_more_steps_where_there_is_room() -> None:
    students = {"a": Busy(0.5)}
    assert shared_s(Busy(2.0), 1, students, 8) == pytest.approx(2.0)
    assert shared_s(Busy(2.0), 2, students, 8) == pytest.approx(1.0)
    assert shared_s(Busy(2.0), 4, students, 8) == pytest.approx(0.5)
    # A stage's window is at least one more than its teachers, or some would have nothing to do.
    assert shared_s(Busy(4.0), 8, students, 16) == pytest.approx(0.5)
    # All begin at once, so a hundred steps come at once: what counts is the pace over many of these.
    assert shared_s(Busy(50.0), 100, {"a": Busy(0.1)}, 200) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(
    ("teacher", "students", "cores"),
    [
        (0.32, {"a": 1.49, "b": 1.15}, 2.0),
        (0.75, {"a": 0.32, "b": 0.31}, 2.0),
        (0.70, {"a": 1.49, "b": 0.80}, 2.0),
        (0.40, {"a": 0.9, "b": 0.5, "c": 0.2}, 1.0),
        (1.30, {"a": 0.9, "b": 1.1, "c": 1.2}, 3.0),
    ],
)
def test_it_is_what_time_slices_and_the_coordinators_own_window_give(
    teacher: float, students: dict[str, float], cores: float
) -> None:
    found = shared_s(Busy(teacher), 1, {name: Busy(seconds) for name, seconds in students.items()}, cores)
    assert found == pytest.approx(sliced(teacher, students, cores), rel=0.02)


def sliced(teacher_s: float, students: dict[str, float], cores: float, slice_s: float = 0.002) -> float:
    """A tiny share of work for all who are ready, again and again; the window says what the teacher may begin."""
    steps = 64
    window = Window(dict.fromkeys(students, 0), steps + 9, 4, 1e9, 0.0)
    doing, to_do = dict.fromkeys(students, 0), dict.fromkeys(students, 0.0)
    there: set[int] = set()
    teaching, teacher_left, now = None, 0.0, 0.0
    ends: list[float] = []
    while len(ends) < steps:
        for name, seconds in students.items():
            if to_do[name] <= 0 and doing[name] in there:
                to_do[name] = seconds
            window.request(name, doing[name] + (to_do[name] > 0), now)
        if teaching is None:
            wanted = [step for step in window.requested_steps(now) if step not in there]
            if wanted:
                teaching, teacher_left = wanted[0], teacher_s
        ready = (teaching is not None) + sum(left > 0 for left in to_do.values())
        done_s = slice_s * min(1.0, (cores - AROUND_CORES) / ready)
        now += slice_s
        teacher_left -= done_s
        if teaching is not None and teacher_left <= 0:
            there.add(teaching)
            teaching = None
        for name in students:
            if to_do[name] > 0:
                to_do[name] -= done_s
                doing[name] += to_do[name] <= 0
        while min(doing.values()) > len(ends):
            ends.append(now)
    return (ends[-1] - ends[steps // 2 - 1]) / (steps // 2)
