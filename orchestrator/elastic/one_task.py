"""One piece of work on the machine and device of a job's worker: what is no training, and too large for the driver."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from orchestrator.byte_counts import BYTES
from orchestrator.errors import Stopped, UserError
from orchestrator.storage.open import fetch

if TYPE_CHECKING:
    from orchestrator.elastic.resources import SlotShape
    from orchestrator.training.job import Job

T = TypeVar("T")
# Raises `Stopped` if the work is to end.
Check = Callable[[], None]

logger = logging.getLogger("orchestrator")

# Of a task whose machine is lost.
_RETRIES = 3


def run_task(job: Job, work: Callable[[Job, Check], T], stop: threading.Event) -> T:
    """Do some work of a job in a Ray task that gets what one of its workers gets.

    Without a cluster, as where a group of workers is run without Ray, it is done in this process.

    Args:
        job: whose `inputs` are on the machine of the task when the work begins.
        work: gets the job, and what to call now and then. It may be done again if its machine is lost.
        stop: when set, the task is cancelled.

    Raises:
        Stopped: `stop` was set.
        UserError: a mistake that the work found, or a cluster that has no machine for it.
    """
    import ray

    if not ray.is_initialized():
        return work(job, lambda: _raise_if(stop))
    from orchestrator.elastic.ray_connection import SLICE_S
    from orchestrator.elastic.resources import slot_of

    shape = slot_of(job)
    _make_room(shape)
    remote = ray.remote(_in_worker).options(**shape.ray_options(), max_retries=_RETRIES)
    answer = remote.remote(job.for_workers(), work)
    try:
        _raise_if(stop)
        while not ray.wait([answer], timeout=SLICE_S)[0]:
            _raise_if(stop)
    except BaseException:
        ray.cancel(answer, force=True)
        raise
    found: T | UserError
    found, counted = ray.get(answer)
    BYTES.add_workers(counted)
    if isinstance(found, UserError):
        raise found
    return found


def _raise_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped


def _make_room(shape: SlotShape) -> None:
    """Have warm workers that wait for work give up their places, if the task finds none beside them."""
    import ray

    from orchestrator.elastic.controller_host import hosts

    free = ray.available_resources()
    if any(free.get(name, 0.0) < amount for name, amount in shape.train_resources().items()):
        hosts.current().drop_idle.remote()


def _in_worker(job: Job, work: Callable[[Job, Check], T]) -> tuple[T | UserError, dict[str, int]]:
    BYTES.take()  # of other tasks of this process
    found: T | UserError
    try:
        for needed in job.inputs:
            fetch(*needed)
        found = work(job, _go_on)
    except UserError as error:
        found = error
    return found, BYTES.take()


def _go_on() -> None:
    """The driver ends the task, not the task itself."""
