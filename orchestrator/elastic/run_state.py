"""Ray Train's state of a run as a file beside its work: what `orchestrator status` shows without a dashboard."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import TrainControllerState
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext

logger = logging.getLogger("orchestrator")

STATE = "ray_train.json"
# Attempts that are kept: a spot run of weeks has thousands.
_KEPT = 50


class RunStateFile(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Writes a run's state, its scaling range and its attempts with their failed ranks whenever they change.

    Args:
        work: the job's folder.
    """

    def __init__(self, work: Path) -> None:
        self._file = work / STATE
        self._record: dict[str, Any] = {}
        self._attempts: list[dict[str, Any]] = []

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """See Ray Train's."""
        scaling = train_run_context.scaling_config
        self._record = {
            "id": train_run_context.run_id,
            "name": train_run_context.get_run_config().name,
            "status": "INITIALIZING",
            "workers": [scaling.min_workers, scaling.max_workers],
            "num_attempts": 0,
        }
        self._write()

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """See Ray Train's."""
        status = current_state._state_type.state_name
        if status != self._record.get("status"):
            self._record["status"] = status
            self._write()

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """See Ray Train's."""
        self._record["num_attempts"] += 1
        self._attempts.append(
            {
                "id": worker_group_context.run_attempt_id,
                "status": "RUNNING",
                "workers": worker_group_context.num_workers,
                "started": time.time(),
                "failed_ranks": [],
            }
        )
        self._write()

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
        ended = {"status": status, "ended": time.time(), "failed_ranks": sorted(errors), "detail": detail[0]}
        self._attempts[-1] |= ended
        self._write()

    def _write(self) -> None:
        draft = self._file.with_name(f".{self._file.name}")
        try:
            draft.write_text(json.dumps({**self._record, "attempts": self._attempts[-_KEPT:]}, indent=1))
            draft.replace(self._file)
        except OSError as error:
            logger.warning("the state of %s is not kept: %s", self._record.get("name"), error)
