"""When a teacher gives its place to students, by what the cluster has free and what they need; no cluster runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.teacher_service.coordinator import Status
from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.teacher_service.placement import FreeNode
from orchestrator.teacher_service.supervisor import TeacherSupervisor


def node(free: float, *, leaving: bool = False) -> FreeNode:
    return FreeNode("n", False, leaving, cpus=4.0, gpus=0.0, free_cpus=free, free_gpus=0.0)


def gives(
    needs: Sequence[tuple[int, float]], there: Sequence[FreeNode], unasked_s: float = 100.0, cpus: float = 1.0
) -> bool:
    supervisor: Any = TeacherSupervisor(
        "c", lambda: None, 2, gpus=0.0, stuck_s=1.0, patience_s=1.0, squeeze=True, needs=needs
    )
    supervisor._cpus = cpus
    retired: list[str] = []
    coordinator = SimpleNamespace(retire=SimpleNamespace(remote=retired.append))
    supervisor._make_room(coordinator, Status(TeacherCounters(), unasked_s=unasked_s), there)
    return bool(retired)


@pytest.mark.parametrize(
    ("needs", "free", "is_given"),
    [
        ([(1, 1.0)], [0.0], True),
        ([(1, 1.0)], [1.0], False),
        ([(1, 2.0)], [1.0], True),
        ([(1, 2.0)], [1.0, 1.0], True),
        ([(1, 2.0)], [0.0, 2.0], False),
        ([(2, 1.0)], [1.0], True),
        ([(2, 1.0)], [1.0, 1.0], False),
        ([(3, 0.1)], [0.3], False),
        ([(1, 4.0), (1, 1.0)], [1.0], False),
    ],
)
def test_it_is_given_where_no_student_can_begin_beside_it(
    needs: list[tuple[int, float]], free: list[float], is_given: bool
) -> None:
    assert gives(needs, [node(one) for one in free]) == is_given


def test_a_machine_that_is_about_to_go_has_no_room() -> None:
    assert gives([(1, 1.0)], [node(4.0, leaving=True)])


def test_it_stays_while_a_student_asks_and_where_it_has_no_place_of_its_own() -> None:
    assert not gives([(1, 1.0)], [node(0.0)], unasked_s=5.0)
    assert not gives([(1, 1.0)], [node(0.0)], cpus=0.0)
