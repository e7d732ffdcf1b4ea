"""Ray Train's scaling policy for machines that come and go; the rules are in `scaling_rules.py`.

It shrinks at once to the slots that answer and waits for nobody, asks the workers to checkpoint before every resize,
and grows when that pays.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.scaling_policy import ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState

from orchestrator.elastic.scaling_rules import RequestStop, Start, Wait
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.elastic.controller import ElasticRun

# How long the controller sleeps for news of slots where there is no group: without it the loop would spin.
_WAIT_S = 0.1
# A slot takes as long to be placed and started; until then a wait for machines is not worth a line.
_PLACING_S = 3.0


class ElasticScalingPolicy(ScalingPolicy):  # type: ignore[misc]
    """Decides how many workers a run has; `run` is what is run."""

    def __init__(self, run: ElasticRun) -> None:
        super().__init__(run.scaling_config)
        self._run = run
        self._waits_since: float | None = None
        self._waits_for = ""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """See Ray Train's. No resources are requested: a slot without a machine is a pending actor, which asks."""

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self._run.rules.workers[1])

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """See Ray Train's: start a group on the slots that are ready, or wait a moment."""
        self._run.poll_pool(_WAIT_S)
        return self._start() or NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """See Ray Train's: ask the group to stop before it is resized; the controller goes on when it has."""
        run = self._run
        run.poll_pool(0.0)
        if run.has_stopped or run.is_ending(worker_group_status):
            return NoopDecision()
        with run.pool.lock:
            decision = run.rules.decide(time.monotonic())
        if isinstance(decision, RequestStop):
            run.monitor.line(f"{decision.reason}: checkpointing")
            run.request_stop(decision.reason)
        return NoopDecision()

    def _start(self) -> ResizeDecision | None:
        run = self._run
        with run.pool.lock:
            # What is decided must still hold when the slots are acquired.
            decision = run.rules.decide(time.monotonic())
            started = isinstance(decision, Start) and run.acquire(decision.slots)
        if isinstance(decision, Start) and started:
            self._waits_since, self._waits_for = None, ""
            resources = run.spec.shape.train_resources()
            return ResizeDecision(num_workers=len(decision.slots), resources_per_worker=resources)
        if isinstance(decision, Wait):
            self._wait(decision.reason)
        return None

    def _wait(self, reason: str) -> None:
        """Account for the time without machines, and say so once it is more than a slot takes to be placed."""
        run, now = self._run, time.monotonic()
        if self._waits_since is None:
            self._waits_since = now
        waited = now - self._waits_since
        self._limit(waited, reason)
        if run.pool.trouble:
            reason = f"{reason}; {run.pool.trouble}"
        elif run.rules.pool.starting(run.spec.name):
            return
        run.monitor.waiting()
        if waited > _PLACING_S and reason != self._waits_for:
            self._waits_for = reason
            since = time.strftime("%H:%M:%S", time.localtime(time.time() - waited))
            limit = run.spec.elastic.wait_for_workers_s
            end = "" if limit is None else f", or ends after {limit:.0f} s"
            run.monitor.line(f"{reason}: waiting since {since}; it continues once there are enough{end}")

    def _limit(self, waited: float, reason: str) -> None:
        run = self._run
        limit = run.spec.elastic.wait_for_workers_s
        if limit is not None and waited > limit:
            raise UserError(
                f"{run.spec.name} waited {waited:.0f} s for machines: {reason}",
                where="elastic.wait_for_workers_s",
                hint="add machines, lower the minimum of elastic.workers, or raise the limit",
            )
