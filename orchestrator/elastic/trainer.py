"""A job as a Ray Train run: `ElasticTrainer` is a `DataParallelTrainer`, and `run` is what stages call.

The trainer lives in the driver. Ray Train's controller runs in the pipeline's :class:`controller.ControllerHost`; the
driver takes in what the run reports (metrics, lines) and passes on what is asked of it (a stop, other worker limits).
"""

from __future__ import annotations

import importlib
import logging
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray
import ray.cloudpickle
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
from ray.train.v2._internal.callbacks.working_dir_setup import WorkingDirectorySetupCallback
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from orchestrator import progress
from orchestrator.byte_counts import BYTES
from orchestrator.elastic.controller import ControllerStuckError, RunSpec
from orchestrator.elastic.controller_host import hosts
from orchestrator.elastic.ray_connection import answer_of
from orchestrator.elastic.resources import SlotShape, slot_of, workers_of
from orchestrator.elastic.run_monitor import ACCOUNT
from orchestrator.elastic.time_accounting import TimeAccounting, report_metrics
from orchestrator.elastic.worker_group import AttemptConfig
from orchestrator.elastic.worker_slot import train_fn
from orchestrator.errors import Stopped, UserError
from orchestrator.slow_import import warn_if_slow
from orchestrator.tracking.run import Run

if TYPE_CHECKING:
    from orchestrator.training.job import Job

logger = logging.getLogger("orchestrator")

# Ray Train's folder in a job's own.
_RAY_TRAIN = "ray_train"
_NEWS_S = 0.5
_ANSWER_S = 60.0
# A controller that dies so often in a row without a new step will not get anywhere.
_MAX_LOST_CONTROLLERS = 4


def run(
    job: Job, *, tracker: Run, stop: threading.Event, on_line: Callable[[str], None] = logger.info
) -> dict[str, float]:
    """Train `job` on the connected cluster until its last step is done.

    Args:
        job: what to train.
        tracker: the run that gets its metrics.
        stop: when set, the job checkpoints and ends.
        on_line: gets a line for each event that the user should know of.

    Returns:
        The job's goodput and what was lost, for a summary.

    Raises:
        Stopped: `stop` was set and the job is checkpointed.
        UserError: a mistake found inside a worker, or a cluster that cannot run the job.
        RuntimeError: the job failed; the worker's exception is the message.
    """
    if not job.is_done():
        _fit(job, tracker, stop, on_line)
    return report_metrics(TimeAccounting.load(job.work / ACCOUNT))


def _fit(job: Job, tracker: Run, stop: threading.Event, on_line: Callable[[str], None]) -> None:
    """Fit until it is done; a controller that dies is replaced, and its workers go on from their checkpoint."""
    lost, cluster = 0, hosts.cluster
    while True:
        before = max(job.checkpoint_storage.committed(), default=0)
        host = hosts.current(cluster)
        try:
            outcome = ElasticTrainer(job, host, tracker, stop, on_line).outcome()
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ControllerStuckError) as error:
            if "creation task" in str(error):
                raise RuntimeError(f"{job.name}: the controller cannot start: {error}") from error
            lost = 0 if max(job.checkpoint_storage.committed(), default=0) > before else lost + 1
            if lost >= _MAX_LOST_CONTROLLERS:
                what = f"{job.name} makes no progress: its controller died {lost} times in a row"
                raise RuntimeError(what) from error
            stuck = isinstance(error, ControllerStuckError)
            what = "makes no progress" if stuck else f"is gone ({type(error).__name__})"
            on_line(f"{job.name}: its controller {what}; a new one starts")
            hosts.replace(host, cluster)
            continue
        if outcome["error"] is not None:
            raise outcome["error"]
        if outcome["stopped"]:
            raise Stopped(f"{job.name} is checkpointed")
        return


class ElasticTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Runs one job under Ray Train, on workers that may come and go.

    Checkpoints, metrics and the training loop are the project's own; `Result.checkpoint` points to the newest
    elastic checkpoint.

    Args:
        job: what to train.
        host: the controller host's actor.
        tracker: the run that gets its metrics.
        stop: when set, the job checkpoints and ends.
        on_line: gets a line for each event that the user should know of.

    Raises:
        UserError: the cluster cannot run the job, or a callback cannot be made.
    """

    def __init__(
        self, job: Job, host: Any, tracker: Run, stop: threading.Event, on_line: Callable[[str], None]
    ) -> None:
        shape = slot_of(job)
        # Which checkpoint to go on from is for our own records to say. Those that Ray Train kept of an earlier fit of
        # this run may name pointers that are gone, which it takes for a fatal error.
        shutil.rmtree(job.work / _RAY_TRAIN, ignore_errors=True)
        job.work.mkdir(parents=True, exist_ok=True)
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
                resources_per_worker=shape.train_resources(),
                label_selector=dict(shape.labels) or None,
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
        # Slots have no placement group to clean up and keep their working folder, and no job reads a Ray dataset.
        unused = (PlacementGroupCleanerCallback, WorkingDirectorySetupCallback, DatasetsCallback)
        found = super()._create_default_callbacks()
        callbacks = [callback for callback in found if not isinstance(callback, unused)]
        if not any(isinstance(callback, StateManagerCallback) for callback in callbacks):
            # Before the user's: a callback that raises keeps those after it from hearing.
            callbacks.insert(0, StateManagerCallback(datasets=self.datasets))
        return callbacks

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return self._session.fit(self._spec, arguments)


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
        self.workers = workers_of(job, shape)
        self.outcome: dict[str, Any] | None = None
        self._run_id = uuid.uuid4().hex
        self._ended = threading.Event()
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix=f"record-{job.name}")

    def fit(self, spec: Any, arguments: dict[str, Any]) -> Any:
        """Run the controller in the host, and serve it until it is done; returns Ray Train's result."""
        done = self._host.fit.remote(spec, self._run_id, arguments)
        stopping = False
        try:
            while True:
                ready, _ = ray.wait([done], timeout=0)
                news = self._host.news.remote(self._run_id, 0.0 if ready else _NEWS_S)
                self._handle(answer_of(news, _ANSWER_S))
                if ready:
                    result, self.outcome = ray.get(done)
                    self._handle(answer_of(self._host.forget.remote(self._run_id), _ANSWER_S))
                    return result
                if self._stop.is_set() and not stopping:
                    stopping = self._send({"stop": True})
                self._limit()
        except BaseException:
            # Nobody would take in what it reports.
            self._host.send.remote(self._run_id, {"stop": True})
            raise
        finally:
            self._ended.set()
            self._recorder.shutdown(cancel_futures=True)

    def _handle(self, events: Sequence[dict[str, Any]]) -> None:
        for event in events:
            match event["kind"]:
                case "metrics":
                    self._tracker.metrics(event["values"], event["step"], event["channel"])
                    if event["channel"] == "train":
                        self._report(event["step"], event["values"])
                case "tags":
                    self._tracker.tags(event["values"])
                case "line":
                    self._on_line(event["text"])
                case "routine":
                    logger.info("%s", event["text"], extra=progress.ROUTINE)
                case "log":
                    logger.log(event["level"], "%s", event["text"])
                case "bytes":
                    BYTES.add_workers(event["values"])
                case "record":
                    self._recorder.submit(self._record, event["step"])

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        seconds, total = metrics["step_seconds"], self._job.num_steps
        detail = f"loss {metrics['loss']:.3f}, {seconds:.2f} s a step"
        progress.report(progress.Progress(self._job.name, step, total, detail, (total - step) * seconds))

    def _record(self, step: int) -> None:
        """Tell the workers once the curve up to `step` is where no lost machine can take it."""
        while not self._tracker.secure():
            if self._ended.wait(_NEWS_S):
                return
        self._send({"recorded": step})

    def _limit(self) -> None:
        workers = workers_of(self._job, self._shape)
        if workers != self.workers and self._send({"workers": workers}):
            self.workers = workers

    def _send(self, message: dict[str, Any]) -> bool:
        """Pass something on to the run; False if it is not there yet."""
        return bool(answer_of(self._host.send.remote(self._run_id, message), _ANSWER_S))


def _callbacks(paths: Sequence[str]) -> list[Any]:
    """Ray Train callbacks that a pipeline file names as `package.module:Class`.

    Raises:
        UserError: one cannot be imported, or is not a Ray Train callback.
    """
    made = []
    for path in paths:
        module, _, name = path.partition(":")
        try:
            with warn_if_slow(module):
                found = importlib.import_module(module)
            made.append(getattr(found, name)())
        except Exception as error:
            raise UserError(
                f"the Ray Train callback {path!r} cannot be instantiated: {type(error).__name__}: {error}",
                where="elastic.ray_train_callbacks",
                hint="name a class that needs no arguments, as package.module:Class",
            ) from error
        if not isinstance(made[-1], RayTrainCallback):
            raise UserError(
                f"{path!r} is not a Ray Train callback",
                where="elastic.ray_train_callbacks",
                hint="derive it from ray.train.UserCallback",
            )
    return made
