"""The split of devices, against every split there is and against sums done by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.capacity.allocate import (
    StudentCost,
    TeacherCost,
    device_hours,
    schedule,
    separate_hours,
    split,
    with_steps,
)
from orchestrator.capacity.contention import AROUND_CORES
from orchestrator.errors import UserError

# Whole sixteenths: sums and halves are exact, so equal step times are equal.
seconds = st.integers(1, 64).map(lambda number: number / 16)
teachers = st.builds(TeacherCost, seconds, st.integers(1, 2))
costs = st.builds(
    StudentCost,
    name=st.just(""),
    num_blocks=st.integers(1, 7),
    block_s=seconds,
    fixed_s=st.one_of(st.just(0.0), seconds),
    exchange_s=st.one_of(st.just(0.0), seconds),
    min_workers=st.integers(1, 3),
    max_workers=st.one_of(st.none(), st.integers(3, 6)),
)
families = st.lists(costs, min_size=1, max_size=3).map(
    lambda found: [replace(one, name=f"s{number}") for number, one in enumerate(found)]
)


def step_of(student: StudentCost, workers: int) -> float:
    """Deal the blocks out one by one; the slowest worker's time."""
    dealt = [0] * workers
    for block in range(student.num_blocks):
        dealt[block % workers] += 1
    extra = student.exchange_s if workers > 1 else 0
    return max(student.fixed_s + extra + blocks * student.block_s for blocks in dealt)


@settings(max_examples=150, deadline=None)
@given(teachers, families, st.integers(0, 7))
def test_no_other_split_is_faster(teacher: TeacherCost, students: list[StudentCost], more: int) -> None:
    least = teacher.devices + sum(student.min_workers for student in students)
    devices = least + more
    found = split(teacher, students, devices)
    ranges = [
        range(student.min_workers, min(student.min_workers + more, student.max_workers or 99) + 1)
        for student in students
    ]
    best = min(
        max(teacher.step_s / actors, *map(step_of, students, workers))
        for actors in range(1, devices // teacher.devices + 1)
        for workers in product(*ranges)
        if actors * teacher.devices + sum(workers) <= devices
    )
    assert found.step_s == best
    chosen = [found.workers[student.name] for student in students]
    assert found.step_s == max(teacher.step_s / found.teachers, *map(step_of, students, chosen))
    assert found.used == found.teachers * teacher.devices + sum(chosen) <= devices
    assert found.leftover == devices - found.used
    assert 0 < found.eta <= 1


@settings(max_examples=100, deadline=None)
@given(teachers, families, st.integers(1, 12).map(lambda half: half / 2))
def test_where_parts_share_devices_no_other_split_is_faster(
    teacher: TeacherCost, students: list[StudentCost], devices: float
) -> None:
    """All work over all devices, and a part never less than alone; what they stand in each other's way comes on top."""
    found = split(teacher, students, devices, share=True)
    left = max(devices - AROUND_CORES, devices / 2)

    def least(actors: int, workers: Sequence[int]) -> float:
        own = [step_of(student, number) for student, number in zip(students, workers, strict=True)]
        work_s = teacher.step_s * teacher.devices + sum(w * s for w, s in zip(workers, own, strict=True))
        return max(teacher.step_s / actors, *own, work_s / left)

    best = min(
        least(actors, workers)
        for actors in range(1, max(1, int(devices)) + 1)
        for workers in product(
            *(
                range(one.min_workers, (one.max_workers or max(one.min_workers, one.num_blocks)) + 1)
                for one in students
            )
        )
    )
    assert least(found.teachers, [found.workers[one.name] for one in students]) == pytest.approx(best)
    assert found.step_s >= best * (1 - 1e-9)
    assert found.used <= devices
    assert found.shared


@pytest.mark.heavy
@settings(max_examples=100, deadline=None)
@given(teachers, families, st.integers(0, 30))
def test_a_device_more_is_never_slower(teacher: TeacherCost, students: list[StudentCost], more: int) -> None:
    least = teacher.devices + sum(student.min_workers for student in students)
    assert split(teacher, students, least + more + 1).step_s <= split(teacher, students, least + more).step_s


def test_a_split_by_hand() -> None:
    """A teacher of 8 s, students of 16 blocks of 1 s and 8 of 1 s on 8 devices: 4 s with 2 + 4 + 2."""
    teacher = TeacherCost(8.0)
    students = [StudentCost("large", 16, 1.0), StudentCost("small", 8, 1.0)]
    found = split(teacher, students, 8)
    assert (found.teachers, found.workers) == (2, {"large": 4, "small": 2})
    assert (found.step_s, found.bound_s, found.eta, found.leftover) == (4.0, 4.0, 1.0, 0)
    nine = split(teacher, students, 9)
    assert (nine.step_s, nine.leftover) == (4.0, 1), (
        "the ninth would shorten nobody's step but its own part's"
    )
    assert nine.eta == pytest.approx(8 / 9)


def test_a_core_that_two_processes_share() -> None:
    """Teacher 1 s and two students of 2 and 3 s on 2 cores: 6 s of work in 3 s, if nobody were in the way."""
    found = split(TeacherCost(1.0), [StudentCost("a", 2, 1.0), StudentCost("b", 2, 1.5)], 2, share=True)
    assert found.bound_s == 3.0
    assert 3.0 < found.step_s < 4.0
    assert found.workers == {"a": 1, "b": 1}
    # A second worker pays where the largest part would else keep everybody waiting.
    lonely = split(TeacherCost(1.0), [StudentCost("a", 2, 1.5)], 2, share=True)
    assert lonely.workers == {"a": 2}
    assert lonely.bound_s == 2.0
    assert 2.0 < lonely.step_s < 2.7


def test_too_few_devices_say_how_many_are_needed() -> None:
    students = [StudentCost("a", 4, 1.0, min_workers=3), StudentCost("b", 4, 1.0)]
    with pytest.raises(UserError, match=r"5 devices are too few.* at least 6") as caught:
        split(TeacherCost(1.0, devices=2), students, 5)
    assert caught.value.where == "teacher 2, a 3, b 1"
    assert split(TeacherCost(1.0, devices=2), students, 6).used == 6


def test_a_student_that_ends_early_leaves_its_devices_to_the_others() -> None:
    teacher = TeacherCost(4.0)
    students = [StudentCost("a", 4, 1.0, steps=10), StudentCost("b", 4, 1.0, steps=30)]
    both, alone = schedule(teacher, students, 3)
    assert (both.steps, alone.steps) == (10, 20)
    assert both.split.workers == {"a": 1, "b": 1}
    assert alone.split.workers == {"b": 1}, "a third device would need a second one for the teacher"
    assert device_hours([both, alone]) == pytest.approx((10 * 4 * 3 + 20 * 4 * 2) / 3600)
    assert separate_hours(teacher, students) == pytest.approx((10 + 30) * 8 / 3600)
    assert with_steps(students, {"a": 0, "b": 7}) == [StudentCost("b", 4, 1.0, steps=7)]


@settings(deadline=None)
@given(teachers, families)
def test_what_cannot_be_is_refused(teacher: TeacherCost, students: list[StudentCost]) -> None:
    with pytest.raises(ValueError, match="needs students"):
        split(teacher, [], 8)
    with pytest.raises(ValueError, match="above 0"):
        split(TeacherCost(0.0), students, 8)
