"""Which steps are computed and kept, from what was asked for: no clock, no Ray."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.teacher_service.window import Window

PATIENCE_S = 100.0


def make(students: dict[str, int | None], num_steps: int = 1000, window: int = 4) -> Window:
    return Window(students, num_steps, window, PATIENCE_S, now=0.0)


def test_the_slowest_student_sets_the_window() -> None:
    window = make({"a": 0, "b": 0})
    assert window.requested_steps(0.0) == [0, 1, 2, 3]
    window.request("a", 4, 1.0)
    assert window.requested_steps(1.0) == [0, 1, 2, 3], "b, not heard of yet, counts from its first step"
    window.request("b", 1, 2.0)
    assert window.requested_steps(2.0)[:2] == [4, 1], "what is asked for comes first, the longest wait first"
    assert window.is_kept(0, 2.0), "another worker of b may not have step 0 yet"
    window.request("b", 3, 3.0)
    assert not window.is_kept(1, 3.0)
    assert window.is_kept(2, 3.0)


def test_a_student_that_left_holds_nobody_and_gets_nothing() -> None:
    window = make({"a": 0, "b": 0})
    window.request("a", 9, 1.0)
    assert 9 not in window.requested_steps(1.0)
    window.deregister("b")
    assert window.requested_steps(1.0) == [9, 10, 11, 12]
    assert not window.request("b", 0, 2.0), "a late call of a worker that is gone"
    assert window.requested_steps(2.0) == [9, 10, 11, 12]


def test_a_student_not_heard_of_stops_to_count_and_counts_again() -> None:
    window = make({"a": 0, "b": 0})
    window.request("a", 4, PATIENCE_S - 1)
    assert 4 not in window.requested_steps(PATIENCE_S - 1)
    window.request("a", 4, PATIENCE_S + 1)
    assert window.requested_steps(PATIENCE_S + 1) == [4, 5, 6, 7]
    window.request("b", 2, PATIENCE_S + 2)
    assert window.requested_steps(PATIENCE_S + 2) == [4, 2, 3, 5]


def test_a_student_of_unknown_whereabouts_counts_when_it_asks() -> None:
    window = make({"a": None, "b": None})
    assert window.requested_steps(0.0) == []
    window.request("a", 30, 0.0)
    assert window.requested_steps(0.0) == [30, 31, 32, 33]
    window.request("b", 20, 1.0)
    assert window.requested_steps(1.0) == [20, 21, 22, 23], "a waits for b, which went back a little"


def test_nobody_is_held_on_one_step_for_ever() -> None:
    window = make({"a": 0, "b": 0})
    for now in range(0, 121, 10):  # b asks all the time, but gets nowhere
        window.request("a", 4, float(now))
        window.request("b", 0, float(now))
        assert (4 in window.requested_steps(float(now))) == (now > PATIENCE_S)
    window.request("a", 5, 121.0)
    assert 5 not in window.requested_steps(121.0), "one step, not all the rest"


def test_a_student_far_behind_goes_alone() -> None:
    window = make({"a": None, "b": None})
    window.request("a", 500, 0.0)
    window.request("b", 100, 1.0)
    assert window.requested_steps(1.0) == [500, 100, 101, 102, 103, 501, 502, 503]
    window.request("b", 496 - 60, 2.0)
    assert window.requested_steps(2.0) == [436, 437, 438, 439], "near enough to wait for"


def test_the_end_is_the_end() -> None:
    window = make({"a": 8}, num_steps=10)
    assert window.requested_steps(0.0) == [8, 9]


@settings(deadline=None)
@given(
    num=st.integers(1, 4),
    size=st.integers(2, 5),
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=120),
)
def test_everyone_finishes_with_bounded_memory(num: int, size: int, turns: list[tuple[int, int]]) -> None:
    """Students move in any order and sometimes fall back; a teacher follows the plan. Nobody is stuck."""
    steps = 25
    names = [f"s{number}" for number in range(num)]
    window = Window(dict.fromkeys(names, 0), steps, size, PATIENCE_S, now=0.0)
    at = dict.fromkeys(names, 0)
    held: set[int] = set()

    def turn(name: str, back: int) -> None:
        if at[name] == steps:
            return
        if back == 6:
            at[name] = max(0, at[name] - 5)  # from an older checkpoint
        assert window.request(name, at[name], 0.0)
        while new := [step for step in window.requested_steps(0.0) if step not in held]:
            held.add(new[0])
            held.intersection_update({step for step in held if window.is_kept(step, 0.0)})
        assert len(held) <= num * (size + 1)
        if at[name] in held:
            at[name] += 1
        if at[name] == steps:
            window.deregister(name)

    for who, back in turns:
        turn(names[who % num], back)
    for _ in range(steps * num + 1):
        for name in names:
            turn(name, 0)
    assert all(step == steps for step in at.values())
