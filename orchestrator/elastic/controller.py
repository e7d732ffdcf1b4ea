"""Ray Train's controller, with our policies and worker groups; and the actor that holds the controllers of a pipeline.

One :class:`ControllerHost` is started with the pipeline's cluster, before the first run needs it. It keeps the pool of
warm slots, and each `fit` of a trainer is one Ray Train controller in a thread of it: a stage that follows another
finds the process there, with everything imported, and so do the students of a distillation, which run at once.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, Result, ScalingConfig
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller import controller as train_controller
from ray.train.v2._internal.execution.controller.controller import TrainControllerLoopIterationResult
from ray.train.v2._internal.execution.controller.state import (
    AbortedState,
    InitializingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2.api.exceptions import TrainingFailedError

from orchestrator.config.elastic import Elastic
from orchestrator.elastic.failure_policy import ElasticFailurePolicy
from orchestrator.elastic.failure_rules import Failure
from orchestrator.elastic.ray_pool import RayWorkerPool, SlotActor
from orchestrator.elastic.resources import SlotShape
from orchestrator.elastic.run_monitor import ACCOUNT, RunMonitor
from orchestrator.elastic.scaling_policy import ElasticScalingPolicy
from orchestrator.elastic.scaling_rules import JobScaling
from orchestrator.elastic.stock_pool import StockPool
from orchestrator.elastic.train_logging import ControllerLogging, logs_of_run
from orchestrator.elastic.worker_group import ElasticWorkerGroup, group_class, prepare_process

logger = logging.getLogger("orchestrator")

Event = dict[str, Any]
# Ray Train polls its workers every 2 s unless it is told otherwise; here a poll brings every step's metrics.
POLL_S = 0.25
# One poll a quarter second for so many workers; with more of them polls get rarer.
_WORKERS_POLLED = 64
_WATCH_S = 0.5
# No step of a controller takes that long: each of its calls to others has a limit, and cold workers have two minutes.
STUCK_S = 300.0
_WITHOUT_GROUP = (InitializingState, RestartingState, ReschedulingState, ResizingState)


@dataclass(frozen=True)
class RunSpec:
    """What the controller knows of a job. The job itself is opaque to it.

    Attributes:
        name: of the job: `stage` or `stage/student`.
        num_blocks: blocks of a step.
        num_steps: optimizer updates of the job.
        work: the job's folder on the driver's machine.
        checkpoints: where its elastic checkpoints are, as an address.
        elastic: of the job.
        workers: minimum and maximum at first.
        shape: of its slots.
    """

    name: str
    num_blocks: int
    num_steps: int
    work: Path
    checkpoints: str
    elastic: Elastic
    workers: tuple[int, int]
    shape: SlotShape

    def checkpoint_uri(self, step: int) -> str:
        """The address of one elastic checkpoint."""
        return f"{self.checkpoints.rstrip('/')}/step-{step:08d}"


class ControllerStuckError(RuntimeError):
    """A run's controller does not move any more."""


class ElasticRun:
    """What the parts of one run share: its slots, its worker group, its monitor, what the driver asks of it.

    Attributes:
        spec: what is run.
        pool: where its slots are from.
        rules: what it knows and decides of its workers.
        monitor: what happened so far.
        slots: acquired for the group that runs or starts.
        stop: the user asked it to checkpoint and end.
        error: why it was given up.
        moved: when its controller last began or ended something, on the monotonic clock.
    """

    def __init__(self, spec: RunSpec, pool: RayWorkerPool | StockPool, context: TrainRunContext) -> None:
        self.spec, self.pool = spec, pool
        self.scaling_config: ScalingConfig = context.scaling_config
        self.failure_config: FailureConfig = context.run_config.failure_config
        self._outbox: deque[Event] = deque()
        self._news = threading.Condition()
        self.monitor = RunMonitor(spec.name, spec.num_steps, spec.work / ACCOUNT, self.emit)
        self.rules = JobScaling(
            spec.name,
            pool.rules,
            spec.workers,
            num_blocks=spec.num_blocks,
            num_steps=spec.num_steps,
            resize_share=spec.elastic.resize_share,
            now=time.monotonic(),
        )
        self.slots: list[SlotActor] = []
        self.stop = False
        self.error: Exception | None = None
        self.moved = time.monotonic()
        self.failure_policy = ElasticFailurePolicy(self)
        self.controller: ElasticController | None = None
        self._ended = True  # the group's end is accounted for
        self._closed = False

    # --- what the policies ask --------------------------------------------------------------------------------

    @property
    def group(self) -> ElasticWorkerGroup | None:
        """The worker group, if there is one."""
        group = self.controller.get_worker_group() if self.controller is not None else None
        return group if group is not None and group.has_started() else None

    @property
    def token(self) -> str:
        """Of the group's attempt."""
        return self.group.token if self.group is not None else ""

    @property
    def workers(self) -> list[Worker]:
        """The group's workers by rank."""
        return list(self.group.get_workers()) if self.group is not None else []

    @property
    def members(self) -> list[Worker]:
        """The group's workers by rank; while it starts, the slots that it starts on, if there are actors."""
        return self.workers or [
            Worker(slot.actor, slot.metadata, {}) for slot in self.slots if slot.actor is not None
        ]

    @property
    def has_stopped(self) -> bool:
        """Whether all workers stopped, checkpointed, as they were asked to."""
        return self.group is not None and len(self.group.stopped) == len(self.group)

    def poll_pool(self, timeout: float) -> None:
        """Take in what became of slots and nodes."""
        self.pool.poll(timeout)

    def acquire(self, names: Sequence[str]) -> bool:
        """Take these slots for the next group; False if one of them is not free any more."""
        with self.pool.lock:
            slots = self.pool.acquire(self.spec.name, names)
            if slots is None:
                return False
            self.rules.group_started(tuple(names), time.monotonic())
        self.slots = slots
        self.monitor.group_started(len(slots))
        self._ended = False
        return True

    def request_stop(self, reason: str) -> None:
        """Ask the group to checkpoint and stop."""
        group = self.group
        if group is not None and not self._ended and not self.rules.stopping:
            self.rules.stop_requested(reason)
            group.request_stop()

    def is_ending(self, status: WorkerGroupPollStatus) -> bool:
        """Whether a worker's train function has returned, so that the others are about to."""
        return any(not one.running for one in status.worker_statuses.values())

    def group_stopped(self) -> None:
        """All workers stopped, checkpointed, as they were asked to."""
        if not self._ended:
            reason = self.rules.stopping
            self._account_end(reason, planned=True)
            self.monitor.goodput.count("resizes", int(not self.stop))

    def group_failed(self, failure: Failure) -> None:
        """The group failed: end what is left of it at once, whatever the controller does next."""
        if self.group is not None:
            self.group.end_processes()
        if not self._ended:
            self._account_end(failure.cause, planned=False)

    def mark_slots(self, answers: Sequence[bool | None], why: str) -> None:
        """Tell the pool which of the group's members answered, did not answer, or are dead (None)."""
        found = list(zip(self.members, answers, strict=True))
        if isinstance(self.pool, StockPool):
            nodes = [worker.metadata.node_id for worker in self.workers]
            self.pool.suspect(node for node, answer in zip(nodes, answers, strict=True) if not answer)
            return
        by_actor = {slot.actor._actor_id: slot.slot.name for slot in self.slots}
        named = [(by_actor.get(member.actor._actor_id, ""), answer) for member, answer in found]
        self.pool.lose([name for name, answer in named if answer is None], why)
        self.pool.set_unresponsive([name for name, answer in named if answer is False])

    def give_up(self, error: Exception) -> None:
        """No further attempt is made."""
        self.error = error

    def _account_end(self, cause: str, *, planned: bool) -> None:
        self._ended = True
        with self.pool.lock:
            self.rules.group_ended(time.monotonic(), lost=not planned)
        self.monitor.group_ended(cause, planned=planned)

    # --- what workers report ----------------------------------------------------------------------------------

    def handle(self, group: ElasticWorkerGroup, rank: int, event: Event) -> None:
        """One event of a worker."""
        match event["kind"]:
            case "step":
                self.monitor.stepped(event)
                with self.pool.lock:
                    self.rules.stepped(event["step"], event["metrics"]["step_seconds"], time.monotonic())
                self.failure_policy.progress(event["step"])
            case "look":
                self.monitor.looked(event["step"], event["held_out"])
            case "record":
                self.emit({"kind": "record", "step": event["step"]})
            case "saved":
                self.monitor.saved(event)
            case "trouble":
                self.monitor.log(logging.WARNING, event["what"])
            case "bytes":
                self.emit(event)
            case "phase":
                self.monitor.phase(event)

    # --- the driver -------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Something for the driver."""
        with self._news:
            self._outbox.append(event)
            self._news.notify_all()

    def poll_events(self, timeout: float) -> list[Event]:
        """What there is for the driver; waits at most `timeout` seconds for something.

        Raises:
            ControllerStuckError: nothing more will come.
        """
        if not self._closed and (still_s := time.monotonic() - self.moved) > STUCK_S:
            faulthandler.dump_traceback()
            raise ControllerStuckError(f"its controller has made no progress for {still_s:.0f} s")
        with self._news:
            self._news.wait_for(lambda: bool(self._outbox), timeout)
            events = list(self._outbox)
            self._outbox.clear()
            return events

    def receive(self, message: Event) -> None:
        """What the driver asks: `stop`, other limits for `workers`, or that a step was `recorded`."""
        if message.get("stop"):
            self.stop = True  # the controller's next step sees to it
        if (workers := message.get("workers")) is not None:
            with self.pool.lock:
                if self._closed:
                    return  # its demand would outlive it
                self.rules.workers = (workers[0], workers[1])
                self.pool.request(self.spec.name, workers[0], workers[1], self.spec.shape)
        if (step := message.get("recorded")) is not None and (group := self.group) is not None:
            group.send(0, {"op": "recorded", "step": step})

    def close(self) -> None:
        """The run is over, however that came about."""
        if self.group is not None:
            self.group.end_processes()
        with self.pool.lock:
            self._closed = True
            self.pool.withdraw(self.spec.name)
        self.monitor.account(last=True)


class ElasticController(TrainController):  # type: ignore[misc]
    """Ray Train's controller with the policies and the worker group of one run."""

    def __init__(self, run: ElasticRun, **arguments: Any) -> None:
        self._run = run
        run.controller = self
        self._worker_group = None
        self.worker_group_cls = group_class(run)
        for name in ("scaling_policy", "failure_policy"):
            arguments.pop(name, None)
        super().__init__(
            scaling_policy=ElasticScalingPolicy(run), failure_policy=run.failure_policy, **arguments
        )
        self._health_check_interval_s = POLL_S

    async def _step(self) -> TrainControllerLoopIterationResult:
        run, state = self._run, self.get_state()
        run.moved = time.monotonic()
        if self._worker_group is not None and isinstance(state, (RestartingState, ReschedulingState)):
            # Ray Train keeps a failed group until the next one starts; its slots may have other work by then.
            self._shutdown_worker_group()
        if run.stop:
            run.request_stop("stop")
            if run.group is None or run.has_stopped:
                return await self._stop()
        if isinstance(state, RunningState) and run.has_stopped:
            run.group_stopped()
            self._shutdown_worker_group()
            return self._next(ResizingState(scaling_decision=NoopDecision()))
        if isinstance(state, ResizingState):
            # Ray Train's own decision for a resize is made beforehand; ours when the group has stopped.
            return self._make_and_handle_scaling_decision_for_non_running_worker_group(state)
        return await super()._step()

    def _get_retry_state(
        self, controller_state: TrainControllerState, training_failed_error: TrainingFailedError
    ) -> TrainControllerState:
        if isinstance(controller_state, _WITHOUT_GROUP):
            # Ray Train ends a run that fails while it has no group, whatever the failure policy decided.
            return ReschedulingState(training_failed_error=training_failed_error)
        return super()._get_retry_state(controller_state, training_failed_error)

    def _next(self, state: TrainControllerState) -> TrainControllerLoopIterationResult:
        return TrainControllerLoopIterationResult(
            run_attempt_id=self._get_run_attempt_id(), previous_state=self.get_state(), next_state=state
        )

    async def _stop(self) -> TrainControllerLoopIterationResult:
        """End the run as it was asked to: it is checkpointed, or was not training."""
        run = self._run
        if run.group is not None:
            run.group_stopped()
            run.group.abort()
        self._worker_group = None
        run.monitor.goodput.stopped = True
        await self._controller_callback_manager.async_invoke("before_controller_shutdown")
        return self._next(AbortedState())

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict[str, float]) -> None:
        super()._start_worker_group(num_workers, resources_per_worker)
        self._health_check_interval_s = POLL_S * max(1.0, num_workers / _WORKERS_POLLED)


class ControllerHost:
    """The actor that holds the pool and the controllers of one pipeline; they end with it.

    Args:
        preload: modules that fork servers import before the first attempt.
        heartbeat_timeout_s: of slots.
    """

    def __init__(self, preload: Sequence[str], heartbeat_timeout_s: float) -> None:
        logging.basicConfig(level=logging.INFO)
        self._pool = RayWorkerPool(preload, heartbeat_timeout_s=heartbeat_timeout_s)
        self._stock: StockPool | None = None
        self._runs: dict[str, ElasticRun] = {}
        self._lock = threading.Lock()
        prepare_process(heartbeat_timeout_s)
        train_controller.LoggingManager = ControllerLogging
        # Slots are placed, warmed and given back also while no run asks.
        threading.Thread(target=self._watch, name="pool", daemon=True).start()

    def pid(self) -> int:
        """This process; an answer says that the actor is there."""
        return os.getpid()

    def prestart(self, number: int, shape: SlotShape) -> None:
        """Start slots before the first run asks for them."""
        self._pool.prestart(number, shape)

    def fit(self, spec: RunSpec, run_id: str, arguments: Mapping[str, Any]) -> tuple[Result, Event]:
        """Run one Ray Train controller to its end; its result, and what the run came to."""
        from orchestrator.elastic.run_state import RunState

        pool: RayWorkerPool | StockPool = self._pool
        if spec.elastic.workers_from == "stock":
            with self._lock:
                pool = self._stock = self._stock or StockPool()
            # Ray Train's own workers need the room of warm ones that wait for work.
            self._pool.drop_idle()
        run = ElasticRun(spec, pool, arguments["train_run_context"])
        try:
            self._runs[run_id] = run
            run.monitor.begin()
            pool.request(spec.name, *spec.workers, spec.shape)
            named = {**arguments, "callbacks": [RunState(run.emit), *arguments["callbacks"]]}
            with logs_of_run(arguments["train_run_context"].run_config.name):
                controller = ElasticController(run, **named)
                asyncio.run(controller.run())
            result = controller.get_result()
        finally:
            run.close()
        error = run.error
        if error is None and result.error is not None:
            error = RuntimeError(f"{spec.name} failed: {result.error}")
        stopped = isinstance(controller.get_state(), AbortedState)
        return result, {"stopped": stopped, "error": error}

    def news(self, run_id: str, timeout: float) -> list[Event]:
        """What a run has for its driver; waits at most `timeout` seconds for something."""
        run = self._runs.get(run_id)
        if run is None:
            time.sleep(min(timeout, 0.05))
            return []
        return run.poll_events(timeout)

    def send(self, run_id: str, message: Event) -> bool:
        """See :meth:`ElasticRun.receive`; False if the run is not there yet."""
        run = self._runs.get(run_id)
        if run is not None:
            run.receive(message)
        return run is not None

    def forget(self, run_id: str) -> list[Event]:
        """The driver has heard the end of a run; returns what it had not heard yet."""
        run = self._runs.pop(run_id, None)
        return run.poll_events(0.0) if run is not None else []

    def drop_idle(self) -> None:
        """Stop the slots that wait for work: something else needs their room."""
        self._pool.drop_idle()

    def slots(self) -> list[dict[str, Any]]:
        """What is known of each slot, for people and tests."""
        return self._pool.snapshot()

    def close(self) -> None:
        """Kill all slots."""
        self._pool.close()

    def _watch(self) -> None:
        while True:
            try:
                self._pool.poll(0.0)
            except Exception:
                # The cluster may be in any state; the next poll may find it better.
                logger.exception("the worker pool could not be queried")
            time.sleep(_WATCH_S)
