"""Ray Train's state of a run as tags of its tracking run: what `orchestrator status` shows without a dashboard."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import TrainControllerState
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext

# Attempts that are kept: a spot run of weeks has thousands, and MLflow takes tags of 8,000 characters.
_KEPT = 10
_DETAIL, _RANKS = 200, 20


class RunState(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Reports a run's state, its scaling range and its attempts with their failed ranks whenever they change.

    Args:
        emit: takes events for the driver.
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._record: dict[str, Any] = {}
        self._attempts: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """See Ray Train's."""
        scaling = train_run_context.scaling_config
        self._record = {
            "id": train_run_context.run_id,
            "name": train_run_context.get_run_config().name,
            "status": "INITIALIZING",
            "workers": f"{scaling.min_workers}-{scaling.max_workers}",
            "num_attempts": 0,
        }
        self._report()

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """See Ray Train's."""
        status = current_state._state_type.state_name
        if status != self._record.get("status"):
            self._record["status"] = status
            self._report()

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """See Ray Train's."""
        self._record["num_attempts"] += 1
        self._attempts.append(
            {
                "id": worker_group_context.run_attempt_id,
                "status": "RUNNING",
                "workers": worker_group_context.num_workers,
                "started": round(time.time(), 3),
                "failed_ranks": [],
            }
        )
        self._report()

    def before_worker_group_shutdown(self, worker_group: WorkerGroup) -> None:
        """See Ray Train's."""
        status = worker_group.get_latest_poll_status()
        errors = status.errors if status is not None else {}
        self._end("ERRORED" if errors else "FINISHED", {rank: str(error) for rank, error in errors.items()})

    def before_worker_group_abort(self, worker_group_context: WorkerGroupContext) -> None:
        """See Ray Train's."""
        self._end("ABORTED", {})

    def _end(self, status: str, errors: dict[int, str]) -> None:
        if not self._attempts:
            return
        detail = next(iter(errors.values()), "").strip().splitlines() or [""]
        self._attempts[-1] |= {
            "status": status,
            "ended": round(time.time(), 3),
            "failed_ranks": sorted(errors)[:_RANKS],
            "num_failed": len(errors),
            "detail": detail[0][:_DETAIL],
        }
        self._report()

    def _report(self) -> None:
        attempts = json.dumps(list(self._attempts))
        tags = {f"ray_train.{name}": value for name, value in {**self._record, "attempts": attempts}.items()}
        self._emit({"kind": "tags", "values": tags})
