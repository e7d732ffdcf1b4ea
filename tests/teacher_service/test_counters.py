"""Counters over actors and drivers, and the machine the teacher gets."""

from __future__ import annotations

from pathlib import Path

from orchestrator.teacher_service.counters import TeacherCounters
from orchestrator.teacher_service.placement import FreeNode, Placement, choose


def test_steps_count_once_however_often_they_are_computed() -> None:
    account = TeacherCounters(images_per_step=4)
    for step in (3, 4, 7, 6, 5, 4, 0):
        account.computed(step, 4, 100)
    assert account.spans == [[0, 1], [3, 8]]
    stats = account.stats()
    assert (stats.images_forwarded, stats.images_needed, stats.steps_recomputed) == (28, 24, 1)
    assert stats.bytes_per_image == 25.0
    assert stats.teacher_forwards_per_image == 28 / 24
    assert TeacherCounters().stats().teacher_forwards_per_image == 0.0


def test_a_later_driver_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "account.json"
    assert TeacherCounters.load(path) == TeacherCounters()
    account = TeacherCounters(images_per_step=4, restarts=2)
    account.computed(0, 4, 10)
    account.save(path)
    assert TeacherCounters.load(path) == account
    path.write_text(path.read_text()[:-3])
    assert TeacherCounters.load(path) == TeacherCounters(), "a torn file"
    path.write_text('{"something": "else"}')
    assert TeacherCounters.load(path) == TeacherCounters()


def machine(node: str, free: float, *, cpus: float = 2, gpus: float = 0, **more: bool) -> FreeNode:
    flags = {"head": False, "leaving": False} | more
    return FreeNode(
        node, flags["head"], flags["leaving"], cpus, gpus, free if cpus else 0, free if gpus else 0
    )


def test_the_teacher_goes_where_there_is_room_and_squeezes_in_elsewhere() -> None:
    assert choose([], 0.0) is None
    assert choose([machine("head", 0, cpus=0, head=True)], 0.0) is None, "a head that is no place for work"
    head, full, free = machine("head", 2, head=True), machine("full", 0), machine("free", 1)
    assert choose([full, free, head], 0.0) == Placement("head", 1.0, 0.0), "the node that outlives the others"
    assert choose([full, free, machine("head", 0, head=True)], 0.0) == Placement("free", 1.0, 0.0)
    assert choose([full], 0.0) == Placement("full", 0.0, 0.0)
    going = machine("going", 2, leaving=True)
    assert choose([going, full], 0.0) == Placement("full", 0.0, 0.0)
    assert choose([going], 0.0) == Placement("going", 1.0, 0.0), "better than none"
    gpu = machine("gpu", 0.5, gpus=1)
    assert choose([head, gpu], 0.1) == Placement("gpu", 0.0, 0.1)
    squeezed = choose([head, machine("gpu", 0.05, gpus=1)], 0.1)
    assert squeezed is not None
    assert (squeezed.node, squeezed.cpus, squeezed.gpus) == ("gpu", 0.0, 0.0)
    assert dict(squeezed.environment)["CUDA_VISIBLE_DEVICES"] == "", "it must not land on the workers' GPU"
    on_cpu = choose([machine("gpu", 2, gpus=1)], 0.0)
    assert on_cpu is not None
    assert dict(on_cpu.environment)["CUDA_VISIBLE_DEVICES"] == "", "`device: cpu` on a node with GPUs"
    assert choose([head], 0.1) is None, "the GPUs are gone: it waits for them, as its students do"
