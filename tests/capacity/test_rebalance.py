"""The split follows the cluster, and only where that is worth a restart."""

from __future__ import annotations

import pytest

from orchestrator.capacity import rebalance as module
from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.capacity.rebalance import Balancer


class Cluster:
    def __init__(self, devices: float) -> None:
        self.devices, self.asked = devices, 0

    def __call__(self) -> float:
        self.asked += 1
        return self.devices


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_S", 0.0)


# On 2, 3 and 4 devices beside the teacher's: 4 s, 3 s and 2 s a step.
STUDENTS = [StudentCost("a", 4, 1.0), StudentCost("b", 3, 1.0)]
TEACHER = TeacherCost(0.5)


def quotas(balancer: Balancer) -> dict[str, tuple[int, int]]:
    return {name: balancer.quota(name)() for name in ("a", "b")}


def test_quotas_follow_machines_that_come_and_go() -> None:
    cluster = Cluster(3)
    balancer = Balancer(TEACHER, STUDENTS, cluster)
    assert quotas(balancer) == {"a": (1, 1), "b": (1, 1)}
    cluster.devices = 4
    assert quotas(balancer) == {"a": (1, 2), "b": (1, 1)}
    cluster.devices = 5
    assert quotas(balancer) == {"a": (1, 2), "b": (1, 2)}
    cluster.devices = 4
    assert quotas(balancer) == {"a": (1, 2), "b": (1, 1)}


def test_a_slow_teacher_gets_actors() -> None:
    cluster = Cluster(3)
    balancer = Balancer(TeacherCost(4.0), STUDENTS, cluster)
    assert balancer.teachers() == 1
    cluster.devices = 6
    assert balancer.teachers() == 2
    assert quotas(balancer) == {"a": (1, 2), "b": (1, 2)}


def test_too_few_devices_leave_everybody_its_fewest() -> None:
    cluster = Cluster(5)
    balancer = Balancer(TEACHER, STUDENTS, cluster)
    quotas(balancer)
    cluster.devices = 2
    assert quotas(balancer) == {"a": (1, 1), "b": (1, 1)}
    assert (balancer.teachers(), balancer.split) == (1, None)


def test_a_little_faster_is_not_worth_a_restart() -> None:
    """A tenth of the work is in blocks: with 3 workers in place of 2, a step is 2 % shorter."""
    cluster = Cluster(3)
    balancer = Balancer(TEACHER, [StudentCost("a", 6, 0.1, fixed_s=4.5)], cluster)
    assert balancer.quota("a")() == (1, 2)
    cluster.devices = 4
    assert balancer.quota("a")() == (1, 2)
    cluster.devices = 2
    assert balancer.quota("a")() == (1, 1), "there is no choice"
    cluster.devices = 7
    assert balancer.quota("a")() == (1, 6)


def test_who_leaves_leaves_devices() -> None:
    balancer = Balancer(TEACHER, STUDENTS, Cluster(4))
    assert quotas(balancer)["b"] == (1, 1)
    balancer.deregister("a")
    assert balancer.quota("b")() == (1, 3)
    assert balancer.quota("a")() == (1, 1), "its controller may still ask"
    balancer.deregister("b")
    assert balancer.teachers() == 1


def test_on_shared_cores_a_lost_one_is_noticed() -> None:
    cluster = Cluster(4)
    balancer = Balancer(TeacherCost(1.0), [StudentCost("a", 4, 1.0)], cluster, share=True)
    assert balancer.quota("a")() == (1, 4)
    cluster.devices = 2
    found = balancer.split
    assert found is not None
    assert (found.workers, found.bound_s) == ({"a": 2}, 2.5)


def test_the_cluster_is_not_asked_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHECK_S", 3600.0)
    cluster = Cluster(4)
    balancer = Balancer(TEACHER, STUDENTS, cluster)
    for _ in range(10):
        quotas(balancer)
    assert cluster.asked == 1
