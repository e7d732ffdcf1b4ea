"""Where a teacher service saturates, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench._saturation import RESOURCES, Design, Node, Work, copies, saturate, sweep
from orchestrator.capacity.allocate import StudentCost, TeacherCost

MIB = 2**20
# 64 images in 16 blocks; a block is 4 MiB of views and 1 MiB of the teacher's.
WORK = Work(
    teacher=TeacherCost(8.0),
    students=(StudentCost("a", 16, 0.5), StudentCost("b", 16, 1.0)),
    images=64,
    view_bytes=MIB,
    teacher_bytes=MIB / 4,
    crop_s=0.125,
)
NODE = Node(devices=4, cores=8, store_gib=1.0, network_gbit=8.0)  # 10⁹ bytes a second
DESIGN = Design(crops="producers", coordinator_calls=100.0, chunk_bytes=4 * MIB)


def test_each_limit_by_hand() -> None:
    """16 devices: the teacher gets 4 (2 s a step), a 4 and b 8, each 2 s."""
    found = saturate(WORK, NODE, DESIGN, 16)
    assert (found.split.teachers, found.split.workers) == (4, {"a": 4, "b": 8})
    limits = found.limits_s
    assert limits["compute"] == 2.0
    assert limits["window"] == 8.0 / 4
    assert limits["crops"] == 64 * 0.125 / 8, "one machine of teachers"
    # Views: a chunk is a block, and goes to one machine. Teacher: a chunk is 4 blocks, of one machine's 4 workers.
    assert limits["egress"] == pytest.approx(2 * 80 * MIB / 1e9)
    assert limits["ingress"] == pytest.approx(80 * MIB / 1e9), "all of a's goes to one machine"
    assert limits["coordinator"] == pytest.approx((4 + 8 + 2) / 100)
    assert found.window == 6
    assert found.store == pytest.approx(6 * 80 / 1024)
    assert (found.step_s, found.busiest) == (2.0, "compute")
    assert found.eta == pytest.approx((8 + 8 + 16) / 16 / 2.0)


@pytest.mark.parametrize(
    ("what", "busiest", "step_s"),
    [
        ({"node": {"cores": 2.0}}, "crops", 4.0),
        ({"node": {"network_gbit": 0.16}}, "egress", 2 * 80 * MIB / 0.02e9),
        ({"design": {"coordinator_calls": 2.0}}, "coordinator", 7.0),
        ({"design": {"window": 2}}, "window", 4.0),
        # Memory for two steps: two of four teachers work.
        ({"node": {"store_gib": 170 / 1024}}, "window", 4.0),
        ({"design": {"crops": "inside"}}, "compute", 3.0),
        ({"work": {"view_bytes": 40.0 * MIB}, "design": {"window": 4}}, "window", 8.0),
    ],
)
def test_what_is_scarce_sets_the_pace(what: dict[str, dict[str, float]], busiest: str, step_s: float) -> None:
    work, node, design = (
        replace(thing, **what.get(name, {}))  # type: ignore[arg-type]
        for name, thing in (("work", WORK), ("node", NODE), ("design", DESIGN))
    )
    found = saturate(work, node, design, 16)
    assert found.busiest == busiest, found.limits_s
    assert found.step_s == pytest.approx(step_s)
    assert found.utilisation()[busiest] == 1.0
    assert max(found.limits_s.values()) == found.step_s
    assert found.eta == pytest.approx(2.0 / step_s), "crops are no computing, wherever they are made"


def test_crops_of_students_spare_the_network_and_cost_processors() -> None:
    found = saturate(WORK, NODE, replace(DESIGN, crops="students"), 16)
    assert found.limits_s["egress"] == pytest.approx(2 * 16 * MIB / 1e9)
    assert found.limits_s["crops"] == 64 * 0.125 / 8, "all of a's are made on its one machine"
    assert found.store == pytest.approx(6 * 16 / 1024)


def test_whole_steps_and_questions_a_worker_cost_more() -> None:
    chunks = saturate(WORK, NODE, DESIGN, 16)
    whole = saturate(WORK, NODE, replace(DESIGN, fetch="step"), 16)
    assert whole.limits_s["egress"] == pytest.approx(3 * 80 * MIB / 1e9), "b has two machines"
    assert chunks.limits_s["egress"] < whole.limits_s["egress"]
    polite = saturate(WORK, NODE, replace(DESIGN, ask="node"), 16)
    assert polite.limits_s["coordinator"] == pytest.approx((1 + 2 + 2) / 100)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 40), st.integers(1, 8))
def test_copies_of_a_chunk_are_counted_as_workers_take_blocks(
    blocks: int, per_chunk: int, workers: int, per_node: int
) -> None:
    """Deal the blocks out as the loop does, and look who wants what."""
    wants: set[tuple[int, int]] = set()
    for worker in range(workers):
        for block in range(worker, blocks, workers):
            wants.add((worker // per_node, block // per_chunk))
    chunks = -(-blocks // per_chunk)
    assert copies(blocks, per_chunk, workers, per_node) == pytest.approx(len(wants) / chunks)


def test_thousands_of_devices_are_quick_and_never_slower_than_few() -> None:
    work = replace(WORK, images=4096, students=tuple(replace(s, num_blocks=256) for s in WORK.students))
    found = sweep(work, NODE, DESIGN, [2, 8, 64, 512, 4096])
    assert [one.devices for one in found] == [8, 64, 512, 4096], "two are too few"
    steps = [one.split.step_s for one in found]
    assert steps == sorted(steps, reverse=True)
    assert all(set(one.limits_s) == set(RESOURCES) for one in found)
