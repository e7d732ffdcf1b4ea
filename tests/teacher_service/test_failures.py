"""What takes the teacher away: its process, its machine, a notice, a stop, a step that never ends."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.teacher_service.actor_client import NAMESPACE
from orchestrator.teacher_service.placement import FreeNode, machines
from orchestrator.teacher_service.service import TeacherService

from .lab import PATIENCE_S, Lab, entries, eventually, keep
from .test_service import expect, later, source

STEPS = 40


def learn(
    service: TeacherService, student: str, first: int = 0, last: int = STEPS, gate: Any = None
) -> Future[None]:
    """A student that takes one step after the other and checks what it gets."""
    blocks = source(service, student)

    def run() -> None:
        for step in range(first, last):
            if gate is not None and step == STEPS // 2:
                gate.wait()
            for index in range(2):
                expect(blocks.load(step, index), step, index)
        service.deregister(student)

    return later(run)


def began(tmp_path: Path, step: int) -> int:
    """The pid of the first teacher that began `step`, once there is one."""
    found = eventually(lambda: [pid for pid, at in entries(tmp_path / "diary") if at == step])
    return int(found[0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_actor_is_killed_or_stopped_midway(
    lab: Lab, tmp_path: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.teacher_service.supervisor._SILENCE_S", 4.0)
    with keep(tmp_path, {"a": 0, "b": 0}, step_s=0.05) as service:
        students = [learn(service, name) for name in ("a", "b")]
        pid = began(tmp_path, 10)
        os.kill(pid, how)
        for student in students:
            student.result(2 * PATIENCE_S)
    check_account(service, tmp_path)
    pids = {pid for pid, _ in entries(tmp_path / "diary")}
    assert len(pids) == 2
    eventually(lambda: not alive(pid))


def check_account(service: TeacherService, tmp_path: Path) -> None:
    """One restart; what the teacher did in its very last moment may be missing."""
    stats = service.account.stats()
    assert stats.teacher_restarts == 1
    assert service.account.spans[-1][1] == STEPS
    assert 4 * (STEPS - 2) <= stats.images_needed <= 4 * STEPS
    done = 4 * len(entries(tmp_path / "diary"))
    assert done - 12 <= stats.images_forwarded <= done
    assert 1.0 <= stats.teacher_forwards_per_image < 1.5


def alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_its_machine_is_lost(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0, "b": 0}, step_s=0.05) as service:
        students = [learn(service, name) for name in ("a", "b")]
        began(tmp_path, 10)
        before = service.supervisors[0].node
        lab.kill(before)
        for student in students:
            student.result(2 * PATIENCE_S)
        assert service.supervisors[0].node != before
    check_account(service, tmp_path)


def test_its_machine_is_about_to_go(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0}, step_s=0.05) as service:
        gate = threading.Event()
        student = learn(service, "a", gate=gate)
        began(tmp_path, 10)
        before = service.supervisors[0].node
        lab.drain(before, 120)
        eventually(lambda: service.supervisors[0].node != before)
        gate.set()
        student.result(2 * PATIENCE_S)
        assert ray.nodes()
    stats = service.account.stats()
    assert stats.teacher_restarts == 1
    assert stats.images_forwarded == 4 * len(entries(tmp_path / "diary")), "no step was cut short"
    lab.kill(before)


@pytest.mark.parametrize("seen", [True, False])
def test_no_room_anywhere(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    """Workers have every place, and wait for the teacher: it squeezes in, also if they were faster."""

    class Worker:
        def pid(self) -> int:
            return os.getpid()

    workers = [ray.remote(Worker).options(num_cpus=1).remote() for _ in range(2)]
    ray.get([worker.pid.remote() for worker in workers], timeout=PATIENCE_S)
    if not seen:
        monkeypatch.setattr("orchestrator.teacher_service.supervisor._ROOM_S", 3.0)
        there = machines()
        stale = [FreeNode(**{**vars(machine), "free_cpus": machine.cpus}) for machine in there]
        views = iter([stale])
        monkeypatch.setattr("orchestrator.teacher_service.service.machines", lambda: next(views, there))
    try:
        with keep(tmp_path, {"a": 0}) as service:
            learn(service, "a", last=3).result(PATIENCE_S)
        assert service.account.restarts == 0
    finally:
        for worker in workers:
            ray.kill(worker)


def test_it_gives_students_the_last_place(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was there before them, and has the place that they wait for."""
    monkeypatch.setattr("orchestrator.teacher_service.supervisor._UNASKED_S", 3.0)
    monkeypatch.setattr("orchestrator.teacher_service.supervisor._LINGER_S", 1.0)

    class Worker:
        def pid(self) -> int:
            return os.getpid()

    remote = ray.remote(Worker).options(num_cpus=1)
    workers = [remote.remote() for _ in range(round(sum(machine.cpus for machine in machines())) - 1)]
    ray.get([worker.pid.remote() for worker in workers], timeout=PATIENCE_S)
    try:
        with keep(tmp_path, {"a": 0}) as service:
            eventually(lambda: service.status.depth)
            workers.append(remote.remote())
            ray.get(workers[-1].pid.remote(), timeout=PATIENCE_S)
            learn(service, "a").result(PATIENCE_S)
            assert service.account.stats().teacher_restarts == 1
    finally:
        for worker in workers:
            ray.kill(worker)


def pid_of_coordinator(service: TeacherService) -> int:
    from ray._private.state import state

    coordinator = ray.get_actor(service.name, NAMESPACE)
    return int(eventually(lambda: state.actor_table(coordinator._actor_id.hex())["Pid"]))


def test_after_the_desk_is_lost_nobody_waits_for_a_student_that_left_or_is_away(
    lab: Lab, tmp_path: Path
) -> None:
    with keep(tmp_path, {"a": 0, "left": 0, "away": 0}, window=2) as service:
        for name in ("a", "left", "away"):
            source(service, name).load(1, 0)
        os.kill(pid_of_coordinator(service), signal.SIGKILL)
        service.deregister("left")  # while there is nobody to tell
        learn(service, "a", first=2, last=8).result(PATIENCE_S)
        assert service.account.coordinator_restarts == 1
        # The one that was away resumes an older step, and gets it.
        learn(service, "away", last=8).result(PATIENCE_S)
        with pytest.raises(RuntimeError, match="left is not one of the students"):
            source(service, "left").load(2, 0)
    assert service.account.restarts == 0, "the teacher did not notice"


@pytest.mark.long
def test_teachers_share_the_steps_and_one_takes_over_what_another_was_at(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0, "b": 0}, window=4, step_s=0.2, teachers=lambda: 2) as service:
        gate = threading.Event()
        students = [learn(service, name, gate=gate) for name in ("a", "b")]
        eventually(lambda: len(service.status.teachers) == 2)
        gate.set()
        eventually(lambda: len({pid for pid, _ in entries(tmp_path / "diary")}) == 2)
        done = Counter(step for _, step in entries(tmp_path / "diary"))
        assert max(done.values()) == 1, "no step twice"
        pid = entries(tmp_path / "diary")[-1][0]
        os.kill(pid, signal.SIGKILL)
        for student in students:
            student.result(2 * PATIENCE_S)
    pids = Counter(pid for pid, _ in entries(tmp_path / "diary"))
    assert len(pids) >= 2
    done = Counter(step for _, step in entries(tmp_path / "diary"))
    assert set(done) == set(range(STEPS))
    # The killed one's step, and those of its steps that students had not fetched.
    assert sum(done.values()) - STEPS <= 5


def test_teachers_come_and_go_and_no_student_notices(lab: Lab, tmp_path: Path) -> None:
    wanted = 1
    with keep(tmp_path, {"a": 0}, window=3, step_s=0.1, teachers=lambda: wanted) as service:
        gate = threading.Event()
        student = learn(service, "a", gate=gate)
        began(tmp_path, 10)
        wanted = 2
        eventually(lambda: len(service.status.teachers) == 2)
        wanted = 1
        eventually(lambda: len(service.status.teachers) == 1)
        gate.set()
        student.result(2 * PATIENCE_S)
    stats = service.account.stats()
    assert stats.teacher_restarts == 0, "one that is not needed any more is not lost"
    assert stats.teacher_forwards_per_image == 1.0, "what it had said stays until it is fetched"


@pytest.mark.long
def test_one_of_the_processes_of_a_teacher_is_killed(lab: Lab, tmp_path: Path) -> None:
    """All of it starts anew, and no student hears of it."""
    with keep(tmp_path, {"a": 0}, shards=2, step_s=0.1, window=3) as service:
        gate = threading.Event()
        student = learn(service, "a", gate=gate)
        began(tmp_path, 10)
        os.kill(int((tmp_path / "teacher-rank-1").read_text()), signal.SIGKILL)
        eventually(lambda: service.account.restarts >= 1)
        gate.set()
        student.result(2 * PATIENCE_S)
    assert len({pid for pid, _ in entries(tmp_path / "diary")}) == 2


@pytest.mark.long
def test_a_teacher_of_several_processes_that_cannot_be_made_says_why(lab: Lab, tmp_path: Path) -> None:
    why = r"failed 3 times before .*process 1 has no weights"
    with keep(tmp_path, {"a": 0}, shards=2, bad_rank=1) as service, pytest.raises(RuntimeError, match=why):
        later(lambda: source(service, "a").load(0, 0)).result(2 * PATIENCE_S)
    assert not entries(tmp_path / "diary")


def test_who_holds_the_others_is_told(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"fast": 0, "slow": 0}, window=2) as service:
        gate = threading.Event()
        slow = learn(service, "slow", gate=gate)
        fast = learn(service, "fast")
        eventually(lambda: service.status.held_s.get("slow", 0.0) > 1.0)
        gate.set()
        for student in (slow, fast):
            student.result(2 * PATIENCE_S)
        assert service.status.held_s.get("fast", 0.0) < service.status.held_s["slow"]


def test_a_step_that_never_ends(lab: Lab, tmp_path: Path) -> None:
    with keep(tmp_path, {"a": 0}, stuck_step=3, stall_timeout_s=8.0) as service:
        learn(service, "a", last=6).result(PATIENCE_S)
    assert service.account.stats().teacher_restarts == 1
    assert len({pid for pid, _ in entries(tmp_path / "diary")}) == 2


def test_counters_go_on_with_the_next_driver_and_nothing_starts_without_students(
    lab: Lab, tmp_path: Path
) -> None:
    with keep(tmp_path, {"a": 0}) as service:
        learn(service, "a", last=3).result(PATIENCE_S)
    first = service.account
    assert first.images_forwarded >= 12
    with keep(tmp_path, {"a": 1}, num_steps=8) as service:
        learn(service, "a", first=1, last=8).result(PATIENCE_S)
    assert service.account.spans == [[0, 8]]
    assert service.account.steps_recomputed == first.spans[0][1] - 1
    with keep(tmp_path, {}) as idle:
        assert not [
            actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"] == idle.name
        ]
    assert idle.account == service.account
