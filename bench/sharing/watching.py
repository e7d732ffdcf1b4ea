"""What the processes of an arm take, seen from outside, and what of that a round takes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from orchestrator.stages.base import Context
from orchestrator.teacher_service.actor_client import NAMESPACE
from orchestrator.tracking.run import NullRun


@dataclass
class Measured:
    """One arm.

    Attributes:
        wall_s: of a round: one step of every student.
        cpu_s: processor time of a round, of everything on the machine at normal priority.
        teacher_s: processor time of a teacher's process for a step.
        student_s: of each student's worker for a step.
        weights: of each student at the end.
        losses: of each student, by step.
    """

    wall_s: float
    cpu_s: float
    teacher_s: float
    student_s: dict[str, float]
    weights: dict[str, dict[str, Any]]
    losses: dict[str, list[float]]


@dataclass(frozen=True)
class Snapshot:
    """Seconds and counts at one moment: of the clock, all processors, teachers, workers; steps and images."""

    wall: float
    busy: float
    teachers: float
    workers: dict[str, float]
    steps: dict[str, int]
    forwarded: int


class Watched(NullRun):
    """A stage's run; knows how far its students are."""

    def __init__(self) -> None:
        super().__init__()
        self.students: dict[str, NullRun] = {}

    def child(self, name: str, resume_id: str | None = None) -> NullRun:
        run = self.students[name.rpartition("/")[2]] = NullRun()
        return run

    def steps(self) -> dict[str, int]:
        """Of each student."""
        return {name: len(run.history()) for name, run in self.students.items()}


def steps_of(context: Context, students: Mapping[str, str]) -> dict[str, int]:
    """Steps done by each student; 0 for one whose run has not begun."""
    assert isinstance(context.run, Watched)
    return dict.fromkeys(students, 0) | context.run.steps()


def snapshot(context: Context, students: Mapping[str, str]) -> Snapshot:
    """All of it, now."""
    times = psutil.cpu_times()
    # What runs at a low priority is not of this bench, unless the bench itself does.
    others = ("idle", "iowait", "steal", *(() if os.nice(0) > 0 else ("nice",)))
    busy = sum(times) - sum(getattr(times, name, 0.0) for name in others)
    teachers = sum(_cpu(process) for process in _processes("ray::TeacherActor"))
    return Snapshot(
        time.monotonic(), busy, teachers, _worker_times(), steps_of(context, students), _forwarded()
    )


def _worker_times() -> dict[str, float]:
    """Processor time of each student's training process."""
    from orchestrator.elastic.controller_host import hosts

    found = {}
    for slot in hosts.slots():
        if slot["job"] is None:
            continue
        children = psutil.Process(slot["pid"]).children(recursive=True)
        # The fork server imports before any window; the worker forked from it is its only other descendant.
        found[slot["job"].rpartition("/")[2]] = sum(_cpu(process) for process in children)
    return found


def _forwarded() -> int:
    """Images that all teachers together have forwarded, as their coordinators know it."""
    import ray

    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    coordinators = [ray.get_actor(name, NAMESPACE) for name in names if name and name.startswith("share-")]
    return sum(
        status.account.images_forwarded
        for status in ray.get([coordinator.status.remote() for coordinator in coordinators])
    )


def _processes(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(title in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def outcome(context: Context) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Weights and losses of all students."""
    from safetensors.torch import load_file

    weights, losses = {}, {}
    for folder in sorted((context.out / "students").iterdir()):
        weights[folder.name] = dict(load_file(folder / "model" / "model.safetensors"))
        history = json.loads((folder / "history.json").read_text())
        history.sort(key=lambda record: int(record["step"]))
        losses[folder.name] = [record["metrics"]["loss"] for record in history]
    return weights, losses


def measured(
    first: Snapshot,
    last: Snapshot,
    images_per_step: int,
    weights: dict[str, dict[str, Any]],
    losses: dict[str, list[float]],
) -> Measured:
    """What lies between the two moments."""
    done = {name: last.steps[name] - first.steps[name] for name in last.steps}
    student_s = {name: (last.workers[name] - first.workers[name]) / done[name] for name in done}
    taught = (last.forwarded - first.forwarded) / images_per_step
    teacher_s = (last.teachers - first.teachers) / taught
    # Students may be at different speeds: their steps count by what they cost.
    whole = teacher_s + sum(student_s.values())
    work = teacher_s * taught + sum(student_s[name] * done[name] for name in done)
    rounds = work / whole
    return Measured(
        wall_s=(last.wall - first.wall) / rounds,
        cpu_s=(last.busy - first.busy) / rounds,
        teacher_s=teacher_s,
        student_s=student_s,
        weights=weights,
        losses=losses,
    )
