"""What it costs to bring a teacher's words from its process to a student's worker."""

from __future__ import annotations

import os
import time
from statistics import median
from typing import TYPE_CHECKING

from orchestrator.elastic.channel import pack, unpack
from orchestrator.teacher_service.payload import TEACHER, block
from orchestrator.teacher_service.teacher_actor import put

if TYPE_CHECKING:
    from bench.sharing.arms import Stand

_REPETITIONS = 20


def transport_s(stand: Stand) -> float:
    """Seconds for the teacher's part of a step.

    Into the object store, out of it, cut into blocks, into the memory that slot and worker share, and mapped there.
    """
    import ray

    parts = {TEACHER: stand.teacher()(0)[TEACHER]}
    num_blocks = stand.num_blocks
    times = []
    for _ in range(_REPETITIONS):
        began = time.perf_counter()
        there = put(parts, num_blocks)
        per_chunk = there.per_chunk[TEACHER]
        fetched = [ray.get(ref) for ref in there.refs[TEACHER]]
        for index in range(num_blocks):
            number, at = divmod(index, per_chunk)
            ids, arrays = block(fetched[number], at, min(per_chunk, num_blocks - number * per_chunk))
            assert ids is not None
            fd, layout = pack({"ids": ids, **arrays})
            unpack(os.dup(fd), layout)
            os.close(fd)
        times.append(time.perf_counter() - began)
    return median(times)
