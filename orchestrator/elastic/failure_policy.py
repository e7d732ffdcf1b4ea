"""Ray Train's failure policy for spot machines; the rules are in `failure_rules.py`.

Ray Train hands over the first error that a poll finds, which is the quickest sign of a loss and often not its cause:
a worker whose peer has died fails first. So the other workers are asked what became of them before anything is
decided. Nodes that go are free, processes that die are free as long as the job gets on, and what the user's code
raises has a budget.
"""

from __future__ import annotations

import logging
import time
import traceback
from typing import TYPE_CHECKING, Any

import ray
from ray.train.v2._internal.exceptions import RayTrainError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from orchestrator.elastic.failure_rules import Budget, Failure, FailureKind, RankOutcome, classify
from orchestrator.elastic.worker_slot import WorkerError
from orchestrator.errors import UserError

if TYPE_CHECKING:
    from orchestrator.elastic.controller import ElasticRun

# After the first sign of a failure, how long others may take to say what they know. One that takes longer may only
# be slow: it is left out of the next group, and not given up before its heartbeat timeout.
_SETTLE_S = 0.6
_STACKS_S = 3.0


class ElasticFailurePolicy(FailurePolicy):  # type: ignore[misc]
    """Decides whether a run goes on after a failure; `run` is what is run."""

    def __init__(self, run: ElasticRun) -> None:
        super().__init__(run.failure_config)
        self._run = run
        self._budget = Budget(run.spec.elastic.max_failures)
        self._lost_nodes: set[str] = set()

    def progress(self, step: int) -> None:
        """`step` updates are done."""
        self._budget.progress(step)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """See Ray Train's."""
        run = self._run
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, UserError
        ):
            run.give_up(training_failed_error.controller_failure)
            return FailureDecision.RAISE
        slot_died_alone = self._still_there()
        failure = self._diagnose(training_failed_error)
        run.group_failed(failure)
        error = self._charge(failure)
        if slot_died_alone and self._budget.broke("a worker slot died on a live node"):
            error = error or RuntimeError(
                f"{run.spec.name} makes no progress: its workers' actors died {self._budget.stalled} times in a row "
                "on live nodes. Is there enough memory?"
            )
        if error is None:
            return FailureDecision.RETRY
        run.give_up(error)
        return FailureDecision.RAISE

    def _charge(self, failure: Failure) -> Exception | None:
        """Take the failure from its budget; the error that ends the run if nothing is left of it."""
        run, name = self._run, self._run.spec.name
        counted = {FailureKind.NODE: "preemptions", FailureKind.USER_CODE: "failures"}.get(failure.kind)
        if counted:
            run.monitor.goodput.count(counted)
        if failure.error is not None and failure.kind is not FailureKind.MISTAKE:
            run.monitor.log(logging.ERROR, f"failed in a worker:\n{failure.error['traceback'].rstrip()}")
        if not self._budget.charge(failure, max(run.monitor.step, 0)):
            run.monitor.goodput.count("restarts")
            return None
        if failure.kind is FailureKind.MISTAKE:
            assert failure.error is not None
            mistake = failure.error["mistake"]
            return UserError(mistake["what"], where=mistake["where"], hint=mistake["hint"])
        if failure.kind is FailureKind.USER_CODE:
            before = self._budget.failures - 1
            again = f" (and {before} before)" if before else ""
            return RuntimeError(f"{name} failed: {failure.cause}{again}")
        times = self._budget.stalled
        return RuntimeError(f"{name} makes no progress: {failure.cause}, {times} times in a row")

    def _still_there(self) -> bool:
        """Whether a node that the failure before this one was put down to is there after all.

        Ray learns of a node's death seconds after its actors', so this cannot be asked at once.
        """
        lost, self._lost_nodes = self._lost_nodes, set()
        return bool(lost) and bool(lost & {node["NodeID"] for node in ray.nodes() if node["Alive"]})

    # --- what happened ----------------------------------------------------------------------------------------

    def _diagnose(self, error: TrainingFailedError) -> Failure:
        """Ask every worker what became of it, and find the cause."""
        run = self._run
        if isinstance(error, ControllerError) and not _is_rays(error.controller_failure):
            # A callback's, or our own: no worker can say more about it.
            return Failure(FailureKind.USER_CODE, _first_line(error), _described(error.controller_failure))
        if not run.members:
            return Failure(FailureKind.PROCESS, _first_line(error))
        failures: dict[int, Exception] = error.worker_failures if isinstance(error, WorkerGroupError) else {}
        outcomes = self._outcomes(failures)
        stuck = {
            rank: failure.end
            for rank, failure in failures.items()
            if isinstance(failure, WorkerError) and failure.end["how"] in ("silent", "stalled")
        }
        stacks = self._stacks() if stuck else {}
        ranks = []
        for rank, worker in enumerate(run.members):
            end = stuck.get(rank, {})
            ranks.append(
                RankOutcome(
                    node=worker.metadata.node_id,
                    answers=outcomes[rank][0],
                    draining=run.pool.is_draining(worker.metadata.node_id),
                    end=outcomes[rank][1],
                    since_heartbeat_s=end.get("seconds") if end.get("how") == "silent" else None,
                    stalled_s=end.get("seconds") if end.get("how") == "stalled" else None,
                    stacks=stacks.get(rank, ""),
                )
            )
        failure = classify(ranks)
        if failure.cause == "the worker group failed":
            failure = Failure(failure.kind, _first_line(error))
        run.mark_slots([rank.answers for rank in ranks], failure.cause)
        self._lost_nodes = {rank.node for rank in ranks if rank.answers is None and not rank.draining}
        return failure

    def _outcomes(self, failures: dict[int, Exception]) -> list[tuple[bool | None, dict[str, Any] | None]]:
        """For every rank whether its slot answers (None: it is dead) and how its process ended."""
        run, token = self._run, self._run.token
        known: dict[int, tuple[bool | None, dict[str, Any] | None]] = {}
        for rank, failure in failures.items():
            if isinstance(failure, WorkerHealthCheckFailedError):
                known[rank] = (None, None)
        deadline = time.monotonic() + _SETTLE_S
        while True:
            asked = {
                worker.actor.outcome.remote(): rank
                for rank, worker in enumerate(run.members)
                if rank not in known or known[rank] == (True, None) or known[rank][0] is False
            }
            left = max(0.0, deadline - time.monotonic())
            ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=left) if asked else ([], [])
            for ref in ready:
                try:
                    of, end = ray.get(ref, timeout=_SETTLE_S)
                    known[asked[ref]] = (True, end if of == token else None)
                except ray.exceptions.RayError:
                    known[asked[ref]] = (None, None)
            for ref in late:
                # One that has answered is asked again only for its end.
                known.setdefault(asked[ref], (False, None))
            if time.monotonic() >= deadline or _is_clear(known, len(run.members)):
                return [known[rank] for rank in range(len(run.members))]
            time.sleep(0.05)

    def _stacks(self) -> dict[int, str]:
        """What every worker is doing, also in the log."""
        run = self._run
        refs = [worker.actor.stacks.remote() for worker in run.members]
        ray.wait(refs, num_returns=len(refs), timeout=_STACKS_S)
        stacks = {}
        for rank, ref in enumerate(refs):
            try:
                stacks[rank] = ray.get(ref, timeout=0)
            except ray.exceptions.RayError as error:
                stacks[rank] = f"its slot does not answer ({type(error).__name__})"
            run.monitor.log(logging.WARNING, f"worker {rank} of {len(refs)}:\n{stacks[rank]}")
        return stacks


def _is_clear(known: dict[int, tuple[bool | None, dict[str, Any] | None]], number: int) -> bool:
    """Whether nothing that is still to come could change the cause."""
    if len(known) < number or any(answers is False for answers, _ in known.values()):
        return False
    ends = [end for _, end in known.values() if end is not None]
    if any(answers is None for answers, _ in known.values()):
        return True
    return any(end["how"] == "died" or (end["how"] == "error" and not end["broken"]) for end in ends)


def _is_rays(error: Exception) -> bool:
    """Whether Ray could not do something, as opposed to an exception in code that the controller calls."""
    return isinstance(error, (ray.exceptions.RayError, RayTrainError, OSError))


def _described(error: Exception) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error), "traceback": text, "broken": False}


def _first_line(error: Exception) -> str:
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"
