"""A job as a Ray Train run: `ElasticTrainer` is a `DataParallelTrainer`, and `run` is what stages call.

The trainer lives in the driver. Ray Train's controller runs in the pipeline's :class:`controller.ControllerHost`; the
driver takes in what the run reports (metrics, lines) and passes on what is asked of it (a stop, other worker limits).
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from orchestrator.elastic.goodput import Goodput, report_figures
from orchestrator.elastic.run_monitor import ACCOUNT
from orchestrator.errors import ClusterLostError, Stopped, UserError
from orchestrator.tracking.runs import Run

if TYPE_CHECKING:
    from orchestrator.elastic.job import Job
    from orchestrator.elastic.resources import SlotShape

logger = logging.getLogger("orchestrator")

# Ray Train's folder in a job's own.
_RAY_TRAIN = "ray_train"
_NEWS_S = 0.5
_ANSWER_S = 60.0
# A controller that dies so often in a row without a new step will not get anywhere.
_MAX_LOST_CONTROLLERS = 4
# What the controller reads from its environment; a user's own setting wins.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A drain is a resize (`scaling_policy.py`); Ray Train's own watcher would end the run as if it were done.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}


def run(
    job: Job, *, tracker: Run, stop: threading.Event, on_line: Callable[[str], None] = logger.info
) -> dict[str, float]:
    """Train `job` on the connected cluster until its last step is done.

    Args:
        job: what to train.
        tracker: the run that gets its metrics.
        stop: when set, the job checkpoints and ends.
        on_line: gets a progress line every few seconds, and one for each event.

    Returns:
        The job's goodput and what was lost, for a summary.

    Raises:
        Stopped: `stop` was set and the job is checkpointed.
        UserError: a mistake found inside a worker, or a cluster that cannot run the job.
        RuntimeError: the job failed; the worker's exception is the message.
    """
    if not job.is_done():
        _fit(job, tracker, stop, on_line)
    job.fetch()
    return report_figures(Goodput.load(job.work / ACCOUNT))


def _fit(job: Job, tracker: Run, stop: threading.Event, on_line: Callable[[str], None]) -> None:
    """Fit until it is done; a controller that dies is replaced, and its workers go on from their checkpoint."""
    import ray

    lost, cluster = 0, hosts.cluster
    while True:
        before = max(job.target.committed(), default=0)
        host = hosts.current(cluster)
        try:
            outcome = _make_trainer(job, host, tracker, stop, on_line).outcome()
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            lost = 0 if max(job.target.committed(), default=0) > before else lost + 1
            if lost >= _MAX_LOST_CONTROLLERS:
                raise RuntimeError(f"{job.name} gets nowhere: its controller died {lost} times") from error
            on_line(f"{job.name}: its controller is gone ({type(error).__name__}); a new one starts")
            hosts.replace(host, cluster)
            continue
        if outcome["error"] is not None:
            raise outcome["error"]
        if outcome["stopped"]:
            raise Stopped(f"{job.name} is checkpointed")
        return


def _make_trainer(
    job: Job, host: Any, tracker: Run, stop: threading.Event, on_line: Callable[[str], None]
) -> Any:
    import ray.cloudpickle
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
    from ray.train.v2._internal.callbacks.working_dir_setup import WorkingDirectorySetupCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from orchestrator.elastic.controller import RunSpec
    from orchestrator.elastic.worker_group import AttemptConfig
    from orchestrator.elastic.worker_slot import train_fn

    class ElasticTrainer(DataParallelTrainer):  # type: ignore[misc]
        """Runs one job under Ray Train, on workers that may come and go.

        Checkpoints, metrics and the training loop are the project's own; `Result.checkpoint` points to the newest
        elastic checkpoint.
        """

        def __init__(self) -> None:
            shape = job.slot_shape()
            self._session = _Session(job, host, shape, tracker, stop, on_line)
            workers = self._session.workers
            self._spec = RunSpec(
                job.name,
                job.num_blocks,
                job.num_steps,
                job.work,
                job.checkpoint_uri,
                job.elastic,
                workers,
                shape,
            )
            blocks = ray.cloudpickle.dumps(job.slot_blocks) if job.slot_blocks is not None else None
            resources = {"CPU": shape.cpus, "GPU": shape.gpus, "memory": float(shape.memory or 0)}
            super().__init__(
                train_fn,
                train_loop_config={
                    "job": job.name,
                    "steps": job.num_steps,
                    "blocks": job.num_blocks,
                    "zero_stage": job.zero_stage,
                },
                backend_config=AttemptConfig(pickle.dumps(job.for_workers()), blocks),
                scaling_config=ScalingConfig(
                    num_workers=workers,
                    use_gpu=shape.gpus > 0,
                    resources_per_worker={name: value for name, value in resources.items() if value},
                    elastic_resize_monitor_interval_s=0.0,
                ),
                run_config=RunConfig(
                    name=job.run_name,
                    storage_path=str((job.work / _RAY_TRAIN).absolute()),
                    failure_config=FailureConfig(max_failures=-1),
                    checkpoint_config=CheckpointConfig(num_to_keep=job.elastic.keep_checkpoints),
                    callbacks=_callbacks(job.elastic.ray_train_callbacks),
                    worker_runtime_env=shape.ray_options().get("runtime_env"),
                ),
            )

        def outcome(self) -> dict[str, Any]:
            """Fit, and say what the run came to."""
            try:
                self.result = self.fit()
            except TrainingFailedError:
                # The worker's own error says more; it is in the outcome.
                if self._session.outcome is None:
                    raise
            assert self._session.outcome is not None
            return self._session.outcome

        def _create_default_callbacks(self) -> list[Any]:
            # Slots have no placement group to clean up, and keep their working folder.
            unused = (PlacementGroupCleanerCallback, WorkingDirectorySetupCallback)
            found = super()._create_default_callbacks()
            callbacks = [callback for callback in found if not isinstance(callback, unused)]
            if not any(isinstance(callback, StateManagerCallback) for callback in callbacks):
                callbacks.append(StateManagerCallback(datasets=self.datasets))
            return callbacks

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            return self._session.fit(self._spec, arguments)

    # Which checkpoint to go on from is for our own records to say. Those that Ray Train kept of an earlier fit of this
    # run may name pointers that are gone, which it takes for a fatal error.
    shutil.rmtree(job.work / _RAY_TRAIN, ignore_errors=True)
    job.work.mkdir(parents=True, exist_ok=True)
    return ElasticTrainer()


class _Session:
    """The driver's side of one fit."""

    def __init__(
        self,
        job: Job,
        host: Any,
        shape: SlotShape,
        tracker: Run,
        stop: threading.Event,
        on_line: Callable[[str], None],
    ) -> None:
        self._job, self._host, self._shape, self._tracker = job, host, shape, tracker
        self._stop, self._on_line = stop, on_line
        self.workers = job.worker_range(shape)
        self.outcome: dict[str, Any] | None = None
        self._run_id = uuid.uuid4().hex
        self._ended = threading.Event()
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix=f"record-{job.name}")

    def fit(self, spec: Any, arguments: dict[str, Any]) -> Any:
        """Run the controller in the host, and serve it until it is done; returns Ray Train's result."""
        import ray

        done = self._host.fit.remote(spec, self._run_id, arguments)
        stopping = False
        try:
            while True:
                ready, _ = ray.wait([done], timeout=0)
                news = self._host.news.remote(self._run_id, 0.0 if ready else _NEWS_S)
                self._take_in(ray.get(news, timeout=_ANSWER_S))
                if ready:
                    result, self.outcome = ray.get(done)
                    self._take_in(ray.get(self._host.forget.remote(self._run_id), timeout=_ANSWER_S))
                    return result
                if self._stop.is_set() and not stopping:
                    stopping = True
                    self._tell({"stop": True})
                self._limit()
        finally:
            self._ended.set()
            self._recorder.shutdown(cancel_futures=True)

    def _take_in(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            match event["kind"]:
                case "metrics":
                    self._tracker.metrics(event["values"], event["step"], event["channel"])
                case "tags":
                    self._tracker.tags(event["values"])
                case "line":
                    self._on_line(event["text"])
                case "log":
                    logger.log(event["level"], "%s", event["text"])
                case "record":
                    self._recorder.submit(self._record, event["step"])

    def _record(self, step: int) -> None:
        """Tell the workers once the curve up to `step` is where no lost machine can take it."""
        while not self._tracker.secure():
            if self._ended.wait(_NEWS_S):
                return
        self._tell({"recorded": step})

    def _limit(self) -> None:
        workers = self._job.worker_range(self._shape)
        if workers != self.workers:
            self.workers = workers
            self._tell({"workers": workers})

    def _tell(self, message: dict[str, Any]) -> None:
        self._host.tell.remote(self._run_id, message)


def _callbacks(paths: Sequence[str]) -> list[Any]:
    """Ray Train callbacks that a pipeline file names as `package.module:Class`.

    Raises:
        UserError: one cannot be imported, or is no Ray Train callback.
    """
    from ray.train.v2.api.callback import RayTrainCallback

    made = []
    for path in paths:
        module, _, name = path.partition(":")
        try:
            made.append(getattr(importlib.import_module(module), name)())
        except Exception as error:
            raise UserError(
                f"the Ray Train callback {path!r} cannot be made: {type(error).__name__}: {error}",
                where="elastic.ray_train_callbacks",
                hint="name a class that needs no arguments, as package.module:Class",
            ) from error
        if not isinstance(made[-1], RayTrainCallback):
            raise UserError(
                f"{path!r} is no Ray Train callback",
                where="elastic.ray_train_callbacks",
                hint="derive it from ray.train.UserCallback",
            )
    return made


class _Hosts:
    """The controller host of the cluster that this driver is connected to.

    Attributes:
        cluster: counts the clusters that this driver was connected to. A thread that still works for a lost one
            must not go on with the one that was started in its place.
    """

    def __init__(self) -> None:
        self.cluster = 0
        self._host: Any = None
        self._arguments: tuple[tuple[str, ...], float] = ((), 15.0)
        self._lock = threading.Lock()

    def begin(self, preload: Sequence[str] = (), heartbeat_timeout_s: float = 15.0) -> None:
        """Start a host for the cluster that this driver has just connected to."""
        with self._lock:
            self.cluster += 1
            self._arguments = (tuple(preload), heartbeat_timeout_s)
            self._host = self._start()

    def prestart(self, number: int, shape: SlotShape) -> None:
        """Start slots before the first run asks for them."""
        if number:
            self.current().prestart.remote(number, shape)

    def current(self, cluster: int | None = None) -> Any:
        """The host's actor; started at first use.

        Raises:
            ClusterLostError: the driver is not connected to `cluster` any more.
        """
        with self._lock:
            self._check(cluster)
            if self._host is None:
                self._host = self._start()
            return self._host

    def replace(self, lost: Any, cluster: int) -> None:
        """This host is gone: start another, unless another run has done so.

        Raises:
            ClusterLostError: see `current`.
        """
        import ray

        with self._lock:
            self._check(cluster)
            if self._host is lost:
                ray.kill(lost)
                self._host = self._start()

    def end(self) -> None:
        """End the host and its slots; to be called before the driver disconnects."""
        import ray

        with self._lock:
            host, self._host = self._host, None
        if host is None:
            return
        try:
            ray.get(host.close.remote(), timeout=5.0)
        except ray.exceptions.RayError as error:
            logger.debug("the controller host did not end itself: %s", error)
        ray.kill(host)

    def _check(self, cluster: int | None) -> None:
        import ray

        if cluster not in (None, self.cluster) or not ray.is_initialized():
            raise ClusterLostError("the cluster of this run is gone", own=True)

    def _start(self) -> Any:
        import ray

        from orchestrator.elastic.controller import ControllerHost

        environment = {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()}
        remote = ray.remote(ControllerHost).options(
            num_cpus=0,
            max_concurrency=1000,
            max_restarts=0,
            runtime_env={"env_vars": environment},
            # With the driver: it ends with it, and writes to the same folder.
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
        return remote.remote(*self._arguments)


hosts = _Hosts()


def slots(timeout: float = 10.0) -> list[dict[str, Any]]:
    """What is known of each slot of this driver's pool."""
    import ray

    return list(ray.get(hosts.current().slots.remote(), timeout=timeout))


def wait_for_host(timeout: float) -> None:
    """Wait until the controller host answers; `time.monotonic` seconds."""
    import ray

    deadline = time.monotonic() + timeout
    ray.get(hosts.current().pid.remote(), timeout=max(0.0, deadline - time.monotonic()))
