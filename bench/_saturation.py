"""Where a teacher service saturates as devices grow: the step time that each resource allows, in the steady state.

A step's demand on a resource over what the resource gives a second is the shortest step that it allows; the stage
goes at the longest of them. No events are played: with a window, all parts work at once, and what is not the
bottleneck waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.capacity.allocate import DeviceSplit, StudentCost, TeacherCost, split
from orchestrator.teacher_service.payload import CHUNK_BYTES

_GIB = 2**30
# A teacher asks for a step and delivers it.
_TEACHER_CALLS = 2
COMPUTE = "compute"
RESOURCES = (COMPUTE, "window", "crops", "egress", "ingress", "coordinator")


@dataclass(frozen=True)
class Node:
    """One machine.

    Attributes:
        devices: accelerators, or cores.
        cores: processors that may make crops.
        store_gib: of Ray's object store.
        network_gbit: a second that the object store moves to or from other machines, each way; of the card and
            what Ray makes of it, the lower.
    """

    devices: int
    cores: float
    store_gib: float
    network_gbit: float


@dataclass(frozen=True)
class Work:
    """What a step is.

    Attributes:
        teacher: without crops.
        images: of a step.
        view_bytes: of an image's crops and masks.
        teacher_bytes: of what the teacher says about an image.
        crop_s: seconds of one processor for an image's crops, decoding included.
    """

    teacher: TeacherCost
    students: tuple[StudentCost, ...]
    images: int
    view_bytes: float
    teacher_bytes: float
    crop_s: float


@dataclass(frozen=True)
class Design:
    """How the service is built.

    Attributes:
        crops: made `inside` a teacher actor before its forward; by `producers` on the teachers' machines, while
            the forward before runs; or again by the `students`, from the seed.
        fetch: a machine of a student gets the `chunks` that hold its workers' blocks, or the whole `step`.
        ask: each `worker` asks the coordinator for each step, or one of each `node`.
        window: steps held or in the making; None: two more than there are teachers.
        coordinator_calls: a second that the coordinator answers.
        chunk_bytes: least size of an object.
    """

    crops: Literal["inside", "producers", "students"] = "inside"
    fetch: Literal["chunks", "step"] = "chunks"
    ask: Literal["worker", "node"] = "worker"
    window: int | None = None
    coordinator_calls: float = 1000.0
    chunk_bytes: float = CHUNK_BYTES


@dataclass(frozen=True)
class Saturation:
    """The steady state on so many devices.

    Attributes:
        limits_s: the shortest step that each of `RESOURCES` allows.
        bound_s: all computing over all devices, crops not among it.
        store: share of the teachers' object stores that the window's steps fill.
        window: steps that are held, after what memory allows.
    """

    devices: int
    split: DeviceSplit
    limits_s: Mapping[str, float]
    bound_s: float
    store: float
    window: int

    @property
    def step_s(self) -> float:
        """Predicted seconds of a step."""
        return max(self.limits_s.values())

    @property
    def busiest(self) -> str:
        """The resource that sets the pace; compute where it is as busy as another one."""
        return max(RESOURCES, key=lambda name: (self.limits_s[name], name == COMPUTE))

    @property
    def eta(self) -> float:
        """Bound ÷ predicted step; 1 is perfect."""
        return self.bound_s / self.step_s

    def utilisation(self) -> dict[str, float]:
        """Of each resource the share of the time, or of its memory, that is used."""
        return {name: limit / self.step_s for name, limit in self.limits_s.items()} | {"store": self.store}


def saturate(work: Work, node: Node, design: Design, devices: int) -> Saturation:
    """The steady state of a distillation on `devices` of such machines.

    Raises:
        UserError: fewer devices than the parts need.
    """
    teacher = work.teacher
    if design.crops == "inside":
        teacher = TeacherCost(teacher.step_s + work.images * work.crop_s, teacher.devices)
    found = split(teacher, work.students, devices)
    teacher_nodes = max(1, math.ceil(found.teachers * teacher.devices / node.devices))
    held_bytes = work.images * (work.teacher_bytes + (0 if design.crops == "students" else work.view_bytes))
    wanted = found.teachers + 2 if design.window is None else design.window
    room = teacher_nodes * node.store_gib * _GIB
    window = max(1, min(wanted, int(room / held_bytes)))
    traffic = _traffic(work, node, design, found)
    bytes_per_s = node.network_gbit / 8 * 1e9
    limits = {
        COMPUTE: found.step_s,
        "window": teacher.step_s / min(found.teachers, window),
        "crops": _crops_s(work, node, design, found, teacher_nodes),
        "egress": sum(traffic.values()) / teacher_nodes / bytes_per_s,
        "ingress": max(traffic[name] / _nodes(found.workers[name], node) for name in traffic) / bytes_per_s,
        "coordinator": _calls(node, design, found) / design.coordinator_calls,
    }
    bound_s = (work.teacher.work_s + sum(student.work_s for student in work.students)) / devices
    return Saturation(devices, found, limits, bound_s, window * held_bytes / room, window)


def sweep(work: Work, node: Node, design: Design, devices: Sequence[int]) -> list[Saturation]:
    """The steady states for several numbers of devices; those that are too few are left out."""
    least = work.teacher.devices + sum(student.min_workers for student in work.students)
    return [saturate(work, node, design, number) for number in devices if number >= least]


def copies(num_blocks: int, per_chunk: int, workers: int, per_node: int) -> float:
    """On how many machines of a student a chunk is wanted, on average.

    Worker r has blocks r, r+W, …, and a machine has workers of consecutive ranks: a chunk of c consecutive blocks
    is wanted wherever one of c consecutive ranks is.
    """
    nodes = -(-workers // per_node)
    starts = range(0, num_blocks, per_chunk)
    wanted = [
        len({index % workers // per_node for index in range(start, min(start + per_chunk, num_blocks))})
        for start in starts
    ]
    return min(nodes, sum(wanted) / len(wanted))


def _traffic(work: Work, node: Node, design: Design, found: DeviceSplit) -> dict[str, float]:
    """Bytes of a step that go to the machines of each student."""
    parts = [work.teacher_bytes] if design.crops == "students" else [work.teacher_bytes, work.view_bytes]
    traffic = {}
    for student in work.students:
        workers = found.workers[student.name]
        total = 0.0
        for bytes_per_image in parts:
            if not bytes_per_image:
                continue
            block_bytes = bytes_per_image * work.images / student.num_blocks
            per_chunk = min(student.num_blocks, math.ceil(design.chunk_bytes / block_bytes))
            times = (
                _nodes(workers, node)
                if design.fetch == "step"
                else copies(student.num_blocks, per_chunk, workers, node.devices)
            )
            total += times * bytes_per_image * work.images
        traffic[student.name] = total
    return traffic


def _crops_s(work: Work, node: Node, design: Design, found: DeviceSplit, teacher_nodes: int) -> float:
    """The shortest step for which crops are made in time."""
    if design.crops == "inside":
        return 0.0  # in the teacher's own time
    if design.crops == "producers":
        return work.images * work.crop_s / (teacher_nodes * node.cores)
    cores = min(_nodes(workers, node) for workers in found.workers.values()) * node.cores
    return work.images * work.crop_s / cores


def _calls(node: Node, design: Design, found: DeviceSplit) -> float:
    asking = (
        sum(found.workers.values())
        if design.ask == "worker"
        else sum(_nodes(workers, node) for workers in found.workers.values())
    )
    return asking + _TEACHER_CALLS


def _nodes(workers: int, node: Node) -> int:
    return -(-workers // node.devices)
