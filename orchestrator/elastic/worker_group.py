"""Ray Train's worker group on warm slots: `WorkerGroup` borrows the pool's actors in the place of fresh ones.

Ray Train's own group creates a placement group and actors, and kills both at its end. `WarmWorkerGroup` replaces
those three methods and keeps the rest: train contexts, callbacks, launch, polls, errors by rank. `ColdWorkerGroup`
is Ray Train's own (`elastic: {workers_from: stock}`). `tests/elastic/test_ray_train_contract.py` names every
internal that is leaned on.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray.train import BackendConfig, Checkpoint
from ray.train.backend import Backend
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group import WorkerGroup, execution_group, worker_group
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupStateBuilder
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.state import state_manager

from orchestrator.elastic.resources import refuse_shared_gpus
from orchestrator.elastic.worker import LOOPBACK
from orchestrator.elastic.worker_slot import ColdWorker, SlotStatus, WorkerError

if TYPE_CHECKING:
    from orchestrator.elastic.controller import ElasticRun

logger = logging.getLogger("orchestrator")

# A report of a checkpoint to Ray Train costs a poll; metrics of steps do not go this way.
_REPORT_EVERY_S = 1.0
# A cold worker imports torch and DeepSpeed before it listens.
_COLD_START_S = 120.0
# A warm one may first have to end the process of the attempt before.
_START_S, _START_S_PER_WORKER = 25.0, 0.02


class _BoundedRay:
    """The `ray` module with a time limit on every `get`: a machine that hangs must not hang the controller.

    Args:
        limit_s: of a `get`.
        forgiving: whether a `get` that takes longer is only logged; for what nobody waits for the result of.
    """

    def __init__(self, limit_s: float, *, forgiving: bool = False) -> None:
        self._limit_s, self._forgiving, self._of_thread = limit_s, forgiving, threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    @contextmanager
    def patient(self, limit_s: float) -> Iterator[None]:
        """Another limit for what this thread gets meanwhile."""
        self._of_thread.limit_s = limit_s
        try:
            yield
        finally:
            del self._of_thread.limit_s

    def get(self, refs: Any, *, timeout: float | None = None) -> Any:
        """`ray.get`, for so long at most unless `timeout` says otherwise."""
        limit_s = getattr(self._of_thread, "limit_s", self._limit_s)
        try:
            return ray.get(refs, timeout=limit_s if timeout is None else timeout)
        except ray.exceptions.GetTimeoutError:
            if not self._forgiving:
                raise
            logger.warning(
                "no answer from Ray's head within %.0f s; training continues, and Ray Train's run state is out of date",
                limit_s,
            )
            return None


class _SyncActors:
    """Ray Train's `SynchronizationActor` class, for groups that need one.

    It is the barrier of `ray.train.report`, which no warm worker calls. A process that imports Ray Train for it,
    beside each restart, would cost that restart a second of a core.
    """

    def __init__(self, actor_class: Any) -> None:
        self._class, self._of_thread = actor_class, threading.local()

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Groups that this thread starts meanwhile get none."""
        self._of_thread.left_out = True
        try:
            yield
        finally:
            self._of_thread.left_out = False

    def options(self, **options: Any) -> Any:
        """See Ray's actor classes."""
        return self if getattr(self._of_thread, "left_out", False) else self._class.options(**options)

    def remote(self, **arguments: Any) -> str:
        """In the place of a handle; nothing calls it."""
        return "no synchronization actor"


_sync_actors = _SyncActors(worker_group.SynchronizationActor)


def prepare_process(limit_s: float) -> None:
    """Fit Ray Train to this process: a time limit on each `ray.get` of a run, and no barrier without use."""
    worker_group.ray = execution_group.ray = _BoundedRay(limit_s)
    state_manager.ray = _BoundedRay(limit_s, forgiving=True)
    worker_group.SynchronizationActor = _sync_actors


class _Placed(PlacementGroupHandle):  # type: ignore[misc]
    """Slots are placed already."""

    placement_group = None

    def ready(self) -> Any:
        return ray.put(True)

    def wait(self, timeout_seconds: float = 30) -> bool:
        return True

    def shutdown(self) -> None:
        pass


class ElasticWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """What both kinds of group share: the workers' events, checkpoint reports, and errors of silent workers.

    Attributes:
        run: what is run; set by :func:`group_class`.
        token: of the attempt; events of other attempts are not heard.
        stopped: ranks that stopped, checkpointed, as they were asked to.
    """

    run: ClassVar[ElasticRun]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.token = secrets.token_hex(4)
        self.stopped: set[int] = set()
        self._worker_health_check_timeout_s = self.run.spec.elastic.heartbeat_timeout_s
        self._report: _TrainingReport | None = None
        self._reported_at = 0.0

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """Pass a message on to the process of one rank."""
        self.get_workers()[rank].actor.send.remote(self.token, message)

    def request_stop(self) -> None:
        """Ask the workers to checkpoint after the step they are at, and to stop."""
        self.send(0, {"op": "stop"})

    def start_timeout_s(self) -> float:
        """How long the start of all processes may take."""
        return _START_S + _START_S_PER_WORKER * len(self)

    def end_processes(self) -> None:
        """End all processes of the attempt now; the actors stay."""
        if self.has_started():
            for worker in self.get_workers():
                worker.actor.end.remote(self.token)

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[SlotStatus]:
        statuses: list[SlotStatus] = super()._poll_workers_and_collect_errors(timeout)
        for rank, status in enumerate(statuses):
            if isinstance(status, SlotStatus) and status.token == self.token:
                if status.end is not None and status.end["how"] == "stopped":
                    self.stopped.add(rank)
                for event in status.events:
                    self._handle(rank, event)
        self._find_stuck(statuses)
        self._report_checkpoint(statuses)
        self.run.monitor.tick()
        return statuses

    def _handle(self, rank: int, event: dict[str, Any]) -> None:
        self.run.handle(self, rank, event)
        if event["kind"] == "saved":
            try:
                self._report = self._pointer(event)
            except OSError as error:
                # A full disk here costs Ray Train its pointer. The checkpoint is where it was written.
                self.run.monitor.log(logging.WARNING, f"a checkpoint is not reported to Ray Train: {error}")

    def _find_stuck(self, statuses: list[SlotStatus]) -> None:
        """Turn silence, or a lack of progress, into the error of a rank, as Ray Train does with other failures."""
        elastic = self.run.spec.elastic
        if any(status.error is not None for status in statuses):
            return
        for status in statuses:
            if isinstance(status, SlotStatus) and status.since_heartbeat_s > elastic.heartbeat_timeout_s:
                status.error = _stuck("silent", status.since_heartbeat_s)
        if len(self.stopped) == len(statuses) or all(not status.running for status in statuses):
            return
        stalled = self.run.monitor.stalled_s(elastic.stall_timeout_s)
        if stalled is not None and all(status.error is None for status in statuses):
            statuses[0].error = _stuck("stalled", stalled)

    def _report_checkpoint(self, statuses: list[SlotStatus]) -> None:
        """Report the newest checkpoint to Ray Train, as if every worker had called `ray.train.report`."""
        ending = len(self.stopped) == len(statuses) or all(not status.running for status in statuses)
        if self._report is None or (time.monotonic() - self._reported_at < _REPORT_EVERY_S and not ending):
            return
        report, self._report, self._reported_at = self._report, None, time.monotonic()
        for status in statuses:
            status.training_report = report

    def _pointer(self, event: dict[str, Any]) -> _TrainingReport:
        """A checkpoint of Ray Train's that says where ours is: a few bytes, whatever the model's size."""
        storage, step = self._storage_context, int(event["step"])
        path = storage.build_checkpoint_path_from_name(f"checkpoint_step-{step:08d}")
        storage.storage_filesystem.create_dir(path, recursive=True)
        pointer = {"uri": self.run.spec.checkpoint_uri(step), "step": step}
        with storage.storage_filesystem.open_output_stream(f"{path}/pointer.json") as file:
            file.write(json.dumps(pointer).encode())
        checkpoint = Checkpoint(path=path, filesystem=storage.storage_filesystem)
        return _TrainingReport(
            checkpoint=checkpoint, metrics={"step": step, **event["metrics"]}, validation=False
        )


class WarmWorkerGroup(ElasticWorkerGroup):
    """A worker group on slots that were acquired from the pool; they survive it."""

    def _start(self) -> None:
        try:
            with _sync_actors.left_out():
                self._start_impl(WorkerGroupStateBuilder())
        except Exception:
            # Not Ray Train's clean-up, which kills the workers.
            for callback in self._callbacks:
                callback.before_worker_group_abort(self._worker_group_context)
            self.end_processes()
            self._clear_state()
            raise

    def _create_placement_group(self, *arguments: Any) -> PlacementGroupHandle:
        return _Placed()

    def _create_workers(
        self, num_workers: int, placement_group: None, resources_per_worker: dict[str, float], **_: Any
    ) -> list[Worker]:
        workers = [
            Worker(slot.actor, slot.metadata, resources_per_worker, placement_group_bundle_index=index)
            for index, slot in enumerate(self.run.slots)
        ]
        return _on_own_gpus(list(self._assign_worker_ranks(workers)))

    def shutdown(self) -> None:
        """See Ray Train's; the processes end, the slots stay."""
        self._assert_active()
        for callback in self._callbacks:
            callback.before_worker_group_shutdown(self)
        self._let_go()
        for callback in self._callbacks:
            callback.after_worker_group_shutdown(self._worker_group_context)

    def abort(self) -> None:
        """See Ray Train's; the processes end, the slots stay."""
        self._assert_active()
        for callback in self._callbacks:
            callback.before_worker_group_abort(self._worker_group_context)
        self._let_go()
        for callback in self._callbacks:
            callback.after_worker_group_abort(self._worker_group_context)

    def _let_go(self) -> None:
        for worker in self.get_workers():
            worker.actor.shutdown.remote()
        self.end_processes()
        self._clear_state()


class ColdWorkerGroup(ElasticWorkerGroup):
    """Ray Train's own worker group: a placement group and fresh actors for each attempt."""

    _worker_cls = ColdWorker

    def start_timeout_s(self) -> float:
        """See `ElasticWorkerGroup`."""
        return _COLD_START_S

    def _start(self) -> None:
        try:
            with worker_group.ray.patient(_COLD_START_S):
                super()._start()
        except Exception:
            if self.has_started():  # else Ray Train has cleaned up
                for callback in self._callbacks:
                    callback.before_worker_group_abort(self._worker_group_context)
                self._worker_group_state.shutdown()
                self._clear_state()
            raise

    def _create_workers(self, *arguments: Any, **named: Any) -> list[Worker]:
        return _on_own_gpus(super()._create_workers(*arguments, **named))

    def shutdown(self) -> None:
        """See Ray Train's; without its patience for hooks of workers that may be dead."""
        self._assert_active()
        for worker in self.get_workers():
            ray.kill(worker.actor)
        super().shutdown()


def _on_own_gpus(workers: list[Worker]) -> list[Worker]:
    refuse_shared_gpus(
        [(worker.metadata.node_id, [str(gpu) for gpu in worker.metadata.gpu_ids]) for worker in workers]
    )
    return workers


def group_class(run: ElasticRun) -> type[ElasticWorkerGroup]:
    """The worker group class of one run: Ray Train's controller makes its groups from a class."""
    base = WarmWorkerGroup if run.spec.elastic.workers_from == "warm" else ColdWorkerGroup
    return type(base.__name__, (base,), {"run": run})


class AttemptBackend(Backend):  # type: ignore[misc]
    """Starts an attempt: a process for every rank, which the others learn where to join."""

    def on_start(self, worker_group: ElasticWorkerGroup, backend_config: AttemptConfig) -> None:
        """See Ray Train's."""
        run, token, workers = worker_group.run, worker_group.token, worker_group.get_workers()
        hosts = {worker.metadata.node_ip for worker in workers}
        host = LOOPBACK if len(hosts) == 1 else workers[0].metadata.node_ip
        common = {
            "token": token,
            "world": len(workers),
            "host": host,
            "mtbf_s": run.rules.mtbf_s(time.monotonic()),
            "stall_timeout_s": run.spec.elastic.stall_timeout_s,
            "proxied": backend_config.blocks is not None,
            "num_blocks": run.spec.num_blocks,
        }
        limit_s = worker_group.start_timeout_s()
        begun = [
            worker.actor.begin.remote({**common, "rank": rank}, backend_config.job, backend_config.blocks)
            for rank, worker in enumerate(workers)
        ]
        # At once, so that it waits beside `begin`: a few milliseconds that every restart would pay for.
        listening = workers[0].actor.listening.remote(token, limit_s)
        ray.get(begun, timeout=limit_s)
        port = ray.get(listening, timeout=2 * limit_s)
        if port is not None:
            for rank in range(1, len(workers)):
                worker_group.send(rank, {"op": "peers", "host": host, "port": port})


class AttemptConfig(BackendConfig):  # type: ignore[misc]
    """What an attempt runs.

    Attributes:
        job: pickled; opaque until it is in a worker, so that neither controller nor slots import torch.
        blocks: pickled, makes blocks in the slot; None where the worker makes them.
    """

    def __init__(self, job: bytes, blocks: bytes | None) -> None:
        self.job, self.blocks = job, blocks

    @property
    def backend_cls(self) -> type[AttemptBackend]:
        """See Ray Train's."""
        return AttemptBackend


def _stuck(how: str, seconds: float) -> WorkerError:
    return WorkerError({"how": how, "seconds": seconds})
