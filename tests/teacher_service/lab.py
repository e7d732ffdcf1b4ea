"""A cluster of several raylets, a teacher that only counts, and students that only ask."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from orchestrator.elastic.nodes import minimal_agents
from orchestrator.teacher_service.payload import TEACHER, VIEWS, Parts
from orchestrator.teacher_service.service import TeacherService

PATIENCE_S = 90.0  # for anything: the machine may be busy

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class CountingTeacher:
    """Says the step's number; two blocks of two samples. Keeps a line for each step in `diary`.

    Args:
        diary: file that gets the pid and the step, before the step is computed.
        bad_step: fails there as long as the file `diary`.fixed does not exist.
        step_s: seconds a step takes.
        stuck_step: never ends, the first time.
    """

    images_per_step = 4

    def __init__(self, diary: Path, bad_step: int = -1, step_s: float = 0.0, stuck_step: int = -1) -> None:
        self.images_forwarded = 0
        self._diary, self._bad, self._step_s, self._stuck = diary, bad_step, step_s, stuck_step

    def __call__(self, step: int) -> Parts:
        again = any(line[1] == step for line in entries(self._diary))
        with self._diary.open("a") as file:
            file.write(f"{os.getpid()} {step}\n")
        if step == self._bad and not self._diary.with_suffix(".fixed").exists():
            raise ValueError(f"no step {step}")
        if step == self._stuck and not again:
            threading.Event().wait()
        time.sleep(self._step_s)
        self.images_forwarded += self.images_per_step
        outputs = {
            "ids": np.arange(4) + 10 * step,
            "ragged/tokens": np.arange(5.0)[:, None] + step,
            "offsets/tokens": np.array([0, 2, 5]),
            "step/scaling": np.array([float(step)]),
        }
        views = {
            "globals": np.full((2, 4, 3), step) + np.arange(4)[None, :, None],
            # Large enough to lie in the object store, not in the reply.
            "bulk": np.full((1, 4, 100_000), step, np.int32),
        }
        return {TEACHER: outputs, VIEWS: views}


class GroupedTeacher(CountingTeacher):
    """A `CountingTeacher` of several processes, which agree on every step; each keeps its pid in `teacher-rank-N`."""

    def __init__(self, diary: Path, bad_rank: int = -1, **more: Any) -> None:
        import torch.distributed as dist

        self._rank = dist.get_rank()
        if self._rank == bad_rank:
            raise ValueError(f"process {bad_rank} has no weights")
        super().__init__(diary, **more)
        (diary.parent / f"teacher-rank-{self._rank}").write_text(str(os.getpid()))

    def __call__(self, step: int) -> Parts:
        from orchestrator.teacher_service import sharding

        sharding.broadcast_step(step)
        self._agree()
        return super().__call__(step)

    def follow(self) -> None:
        from orchestrator.teacher_service import sharding

        while sharding.broadcast_step(None) is not None:
            self._agree()

    def close(self) -> None:
        from orchestrator.teacher_service import sharding

        sharding.broadcast_step(None)

    def _agree(self) -> None:
        import torch
        import torch.distributed as dist

        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert int(ones) == dist.get_world_size()


def entries(diary: Path) -> list[tuple[int, int]]:
    """(pid, step) of every step the teachers began."""
    text = diary.read_text() if diary.exists() else ""
    return [(int(pid), int(step)) for pid, step in (line.split() for line in text.splitlines())]


class Lab:
    """A head node without a place for the teacher, and two nodes with one each."""

    def __init__(self, folder: Path) -> None:
        self._sizes = {"object_store_memory": 256 * 2**20, "include_dashboard": False}
        # The folder's name is short, as sockets live below it.
        head = {"num_cpus": 0, "temp_dir": str(folder), **self._sizes}
        with minimal_agents():
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        self.mend()

    def mend(self) -> None:
        """Two good nodes, after whatever a test did."""
        while len(self.cluster.worker_nodes) < 2:
            with minimal_agents():
                self.cluster.add_node(num_cpus=1, **self._sizes)

    def node(self, node_id: str) -> Any:
        """The raylet behind a Ray node id."""
        return next(node for node in self.cluster.worker_nodes if node.node_id == node_id)

    def kill(self, node_id: str) -> None:
        """The machine is gone, without a word."""
        self.cluster.remove_node(self.node(node_id), allow_graceful=False)

    def drain(self, node_id: str, seconds: float) -> None:
        """The machine announces its end."""
        from ray.core.generated import autoscaler_pb2

        accepted, why = ray._private.worker.global_worker.gcs_client.drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "preemption",
            int((time.time() + seconds) * 1000),
        )
        assert accepted, why

    def close(self) -> None:
        """End everything."""
        ray.shutdown()
        self.cluster.shutdown()


def keep(
    folder: Path,
    students: Mapping[str, int],
    *,
    num_steps: int = 40,
    window: int = 2,
    stall_timeout_s: float = 300.0,
    teachers: Callable[[], int] = lambda: 1,
    shards: int = 1,
    **teacher: Any,
) -> TeacherService:
    """A service with a counting teacher."""
    from functools import partial

    return TeacherService(
        partial(CountingTeacher if shards == 1 else GroupedTeacher, folder / "diary", **teacher),
        students,
        num_steps,
        2,
        window=window,
        stall_timeout_s=stall_timeout_s,
        gpus=0.0,
        account=folder / "account.json",
        on_metrics=lambda metrics: None,
        teachers=teachers,
        shards=shards,
    )


def eventually(what: Callable[[], Any]) -> Any:
    """The first true value of `what`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := what()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:.0f} s"
        time.sleep(0.05)
    return value
