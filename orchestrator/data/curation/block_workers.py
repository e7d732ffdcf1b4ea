"""Who does the pieces of a pass over many rows: threads of this process, or tasks of a Ray cluster.

A piece of work is a function of what all pieces share and of itself, so it can be done again, and anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from threadpoolctl import ThreadpoolController

from orchestrator.data.curation.vectors import FileVectors, SomeVectors

if TYPE_CHECKING:
    from orchestrator.data.curation.ray_vectors import RayVectors

S = TypeVar("S")
P = TypeVar("P")
R = TypeVar("R")

# Pieces that wait at each worker, so that none has to ask before it can go on.
_AHEAD = 2
_WAIT_S = 0.1


class BlockWorkers(Protocol):
    """Does pieces of work, several at once."""

    @property
    def num_workers(self) -> int:
        """Pieces at once."""

    def share(self, value: S) -> Any:
        """Something that many calls of :meth:`run` need: give `run` what this returns."""

    def run(self, work: Callable[[Any, Any, P], R], held: Any, shared: S, pieces: Sequence[P]) -> Iterator[R]:
        """`work(value, shared, piece)` of every piece, in any order.

        Args:
            work: a function of a module.
            held: what :meth:`share` gave for `value`.
            shared: by all pieces of this call.
            pieces: may be done more than once where a worker is lost.
        """


class ThreadWorkers:
    """Threads of this process, with one thread of linear algebra each, so that sums have one order.

    Args:
        num_workers: threads; default: the processors that this process may use.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_workers = num_workers or len(os.sched_getaffinity(0))

    @property
    def num_workers(self) -> int:
        return self._num_workers

    def share(self, value: S) -> S:
        return value

    def run(self, work: Callable[[Any, Any, P], R], held: Any, shared: S, pieces: Sequence[P]) -> Iterator[R]:
        waiting = iter(pieces)
        with _libraries().limit(limits=1), ThreadPoolExecutor(self._num_workers) as pool:
            running: set[Future[R]] = set()
            while True:
                # Results are taken one by one: together they may be larger than what is clustered.
                for piece in waiting:
                    running.add(pool.submit(work, held, shared, piece))
                    if len(running) >= self._num_workers:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                while done:
                    yield done.pop().result()


class RayWorkers:
    """Tasks of the Ray cluster that this process is connected to. A task whose worker or machine is lost is done again.

    Args:
        num_workers: tasks at once; default: the cluster's processors when this is made.
        cpus, gpus: processors and GPUs of a task.
        ahead: tasks that are handed out for each worker. 1 where no more than `num_workers` may run, also on a cluster
            that has room for more.
        max_retries: of a task whose worker is lost; -1 for any number of them, for small pieces on machines that come
            and go. A long task may itself be what ends its worker.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        ahead: int = _AHEAD,
        max_retries: int = -1,
    ) -> None:
        import ray

        self._ahead = ahead
        self._num_workers = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1) / cpus))
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=max_retries)(_one)
        self._files: dict[FileVectors, RayVectors] = {}

    @property
    def num_workers(self) -> int:
        return self._num_workers

    def share(self, value: S) -> Any:
        import ray

        from orchestrator.data.curation.ray_vectors import in_object_store

        # A file of vectors lies on one machine.
        sent = in_object_store(value, self._files) if isinstance(value, (FileVectors, SomeVectors)) else value
        return ray.put(sent)

    def run(self, work: Callable[[Any, Any, P], R], held: Any, shared: S, pieces: Sequence[P]) -> Iterator[R]:
        import ray

        with_all = ray.put(shared)
        waiting = iter(pieces)
        running: list[Any] = []
        try:
            while True:
                for piece in waiting:
                    running.append(self._task.remote(work, held, with_all, piece))
                    if len(running) >= self._ahead * self._num_workers:
                        break
                if not running:
                    return
                # In short waits: a thread may not come out of a long one when the process leaves the cluster.
                done, running = ray.wait(running, num_returns=1, timeout=_WAIT_S)
                for reference in done:
                    yield ray.get(reference)
        finally:
            # Where the caller stops halfway.
            for reference in running:
                ray.cancel(reference)


def _one(work: Callable[[Any, Any, P], R], held: Any, shared: Any, piece: P) -> R:
    with _libraries().limit(limits=1):
        return work(held, shared, piece)


@cache
def _libraries() -> ThreadpoolController:
    """The linear algebra that is loaded, which takes a while to find."""
    return ThreadpoolController()
