"""What a failed worker group means: who failed, and which budget pays. Knows nothing of Ray.

Ray Train's controller asks through `failure_policy.py`, and `orchestrator simulate` asks directly, so what a
simulation predicts is what a cluster does. Times are seconds.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

# A job that fails so often in a row without one new step will not get anywhere.
MAX_STALLED_ATTEMPTS = 8


class FailureKind(Enum):
    """What failed; it decides which budget pays."""

    NODE = "node"  # preempted, or out of reach: nobody's fault
    PROCESS = "process"  # killed, stalled, or lost its peers
    USER_CODE = "user code"  # an exception in the task
    MISTAKE = "mistake"  # a UserError: no retry can help


@dataclass(frozen=True)
class RankOutcome:
    """What is known of one worker of a failed group.

    Attributes:
        node: the node of its slot.
        answers: its slot answered just now; None if the slot is known to be dead.
        draining: its node had announced its end.
        end: how its process ended: `how` is `done`, `stopped`, `error` or `died`; None while it runs.
        since_heartbeat_s: seconds since its process was last heard of, if that is too long.
        stalled_s: seconds since it last made progress, if that is too long.
        stacks: what its threads were doing, for one that is silent or stalled.
    """

    node: str
    answers: bool | None = True
    draining: bool = False
    end: Mapping[str, Any] | None = None
    since_heartbeat_s: float | None = None
    stalled_s: float | None = None
    stacks: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a worker group failed.

    Attributes:
        kind: what failed.
        cause: one line for the log.
        error: what the task raised: type, message, traceback, mistake. Beside a lost node it may be the loss's echo.
    """

    kind: FailureKind
    cause: str
    error: Mapping[str, Any] | None = None


def classify(ranks: Sequence[RankOutcome]) -> Failure:
    """The cause of a group's failure: workers that only lost a peer are not it.

    In this order: a `UserError`, which no lost peer can bring about and no retry can mend; a lost node, since its
    loss breaks all others; a silent process, for the same reason; what the task raised; a slot that does not answer,
    and so may be out of reach as its node is; a process that died; a stall, which all of these bring about in others.
    What the task raised beside a lost node is kept as the failure's `error`, so that it is not hidden.
    """
    errors = [rank.end for rank in ranks if rank.end is not None and rank.end["how"] == "error"]
    own = [error for error in errors if not error["broken"]]
    mistakes = [error for error in own if error.get("mistake")]
    if mistakes:
        return _raised(FailureKind.MISTAKE, mistakes[0])
    lost = [rank for rank in ranks if rank.answers is None]
    if lost:
        noticed = " after its notice" if any(rank.draining for rank in lost) else ""
        what = f"lost {len(lost)} of {len(ranks)} workers: node {_nodes(lost)} is gone{noticed}"
        return Failure(FailureKind.NODE, what, own[0] if own else None)
    if any(rank.since_heartbeat_s is not None for rank in ranks):
        return _stuck(ranks, [rank.since_heartbeat_s for rank in ranks], "has not answered for")
    if own:
        return _raised(FailureKind.USER_CODE, own[0])
    silent = [rank for rank in ranks if not rank.answers]
    if silent:
        what = f"lost {len(silent)} of {len(ranks)} workers: node {_nodes(silent)} does not answer"
        return Failure(FailureKind.NODE, what)
    for number, rank in enumerate(ranks):
        if rank.end is not None and rank.end["how"] == "died":
            return Failure(FailureKind.PROCESS, f"worker {number} died ({_exit(rank.end['code'])})")
    if any(rank.stalled_s is not None for rank in ranks):
        return _stuck(ranks, [rank.stalled_s for rank in ranks], "made no progress for")
    if errors:
        first = str(errors[0]["message"]).strip().splitlines() or [""]
        return Failure(FailureKind.PROCESS, f"workers lost each other: {first[0]}")
    return Failure(FailureKind.PROCESS, "the worker group failed")


def _raised(kind: FailureKind, error: Mapping[str, Any]) -> Failure:
    return Failure(kind, f"{error['type']}: {error['message']}", error)


def _nodes(ranks: Sequence[RankOutcome]) -> str:
    return ", ".join(sorted({rank.node[:8] for rank in ranks}))


def _stuck(ranks: Sequence[RankOutcome], seconds: Sequence[float | None], what: str) -> Failure:
    stopped = [number for number, rank in enumerate(ranks) if "is stopped" in rank.stacks]
    stuck = [number for number, quiet in enumerate(seconds) if quiet is not None]
    who = (stopped or stuck)[0]
    longest = max(quiet for quiet in seconds if quiet is not None)
    why = ranks[who].stacks if stopped else "the stacks are in the log"
    return Failure(FailureKind.PROCESS, f"worker {who} {what} {longest:.0f} s: {why}")


def _exit(code: object) -> str:
    if not isinstance(code, int):
        return str(code)
    if -code in {number.value for number in signal.Signals}:
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


@dataclass
class Budget:
    """Tells losses that are nobody's fault from failures that will come again.

    A node that goes, announced or not, never counts. An exception in the task counts against `max_failures`,
    and the same one twice at the same step ends the job at once: it would come a third time. A process that
    dies by itself, a stall, or a broken connection counts only while the job gets nowhere; so does a node that
    goes while the task raises something, since nobody knows what was first.
    """

    max_failures: int
    failures: int = 0
    stalled: int = 0
    best_step: int = -1
    last: tuple[int, str] | None = None
    seen: dict[str, int] = field(default_factory=dict)

    def charge(self, failure: Failure, step: int) -> bool:
        """A group failed after `step` updates of the job; True if the job should give up."""
        match failure.kind:
            case FailureKind.MISTAKE:
                return True
            case FailureKind.USER_CODE:
                assert failure.error is not None
                return self.failed(step, str(failure.error["type"]))
            case FailureKind.PROCESS:
                return self.broke(failure.cause)
            case FailureKind.NODE if failure.error is not None:
                # Likely an echo of the loss. If it is not, it must not go on for ever behind losses.
                return self.broke("preempted")
            case FailureKind.NODE:
                self.preempted()
                return False

    def progress(self, step: int) -> None:
        """`step` updates are done for the first time."""
        if step > self.best_step:
            self.best_step, self.stalled = step, 0

    def preempted(self) -> None:
        """A node went."""
        self._note("preempted")

    def broke(self, what: str) -> bool:
        """A process died, stalled or lost its peers, and no node went; True if the job should give up."""
        self._note(what)
        self.stalled += 1
        return self.stalled >= MAX_STALLED_ATTEMPTS

    def failed(self, step: int, error: str) -> bool:
        """The task raised `error` (a name) at `step`; True if the job should give up."""
        self._note("failed")
        self.failures += 1
        again, self.last = self.last == (step, error), (step, error)
        return again or self.failures > self.max_failures

    def counts(self) -> Mapping[str, int]:
        """How often what happened."""
        return dict(self.seen)

    def _note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1
