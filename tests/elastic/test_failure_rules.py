"""What a failed group is taken for, when a job gives up, and how often it saves."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any

import pytest

from orchestrator.elastic.failure_rules import (
    MAX_STALLED_ATTEMPTS,
    Budget,
    Failure,
    FailureKind,
    RankOutcome,
    classify,
)

NODE, PROCESS, USER_CODE, MISTAKE = (
    FailureKind.NODE,
    FailureKind.PROCESS,
    FailureKind.USER_CODE,
    FailureKind.MISTAKE,
)


def raised(kind: str, message: str, *, broken: bool = False, mistake: bool = False) -> dict[str, Any]:
    end = {"how": "error", "type": kind, "message": message, "broken": broken, "traceback": "…"}
    return {**end, "mistake": {"what": message, "where": None, "hint": None}} if mistake else end


def died(code: object) -> dict[str, Any]:
    return {"how": "died", "code": code}


def rank(end: Mapping[str, Any] | None = None, **more: Any) -> RankOutcome:
    return RankOutcome(node="0123456789abcdef", end=end, **more)


FINE = rank()
GONE = rank(answers=None)
QUIET = rank(answers=False)
STOPPED = rank(since_heartbeat_s=16.0, stacks="process 7 is stopped (SIGSTOP)")
SILENT = rank(since_heartbeat_s=17.0, stacks="in read()")
STALLED = rank(stalled_s=301.0, stacks="in all_reduce()")
OWN = rank(raised("ValueError", "no such block"))
BAD_FILE = rank(raised("UserError", "no such folder", mistake=True))
CUT_OFF = rank(raised("RuntimeError", "gloo: connection closed\nby a peer", broken=True))
KILLED = rank(died(-9))


@pytest.mark.parametrize(
    ("ranks", "kind", "cause"),
    [
        # one thing at a time
        ([FINE, GONE], NODE, "lost 1 of 2 workers: node 01234567 is gone"),
        (
            [GONE, rank(answers=None, draining=True)],
            NODE,
            "lost 2 of 2 workers: node 01234567 is gone after its notice",
        ),
        ([FINE, QUIET], NODE, "lost 1 of 2 workers: node 01234567 does not answer"),
        ([FINE, SILENT], PROCESS, "worker 1 has not answered for 17 s: the stacks are in the log"),
        ([STALLED, STALLED], PROCESS, "worker 0 made no progress for 301 s: the stacks are in the log"),
        ([FINE, OWN], USER_CODE, "ValueError: no such block"),
        ([FINE, BAD_FILE], MISTAKE, "UserError: no such folder"),
        ([FINE, KILLED], PROCESS, "worker 1 died (killed by SIGKILL)"),
        ([rank(died(3)), FINE], PROCESS, "worker 0 died (exit code 3)"),
        ([rank(died(-77)), FINE], PROCESS, "worker 0 died (killed by signal 77)"),
        ([rank(died("never started"))], PROCESS, "worker 0 died (never started)"),
        ([CUT_OFF, CUT_OFF], PROCESS, "workers lost each other: gloo: connection closed"),
        ([rank(raised("RuntimeError", "", broken=True))], PROCESS, "workers lost each other: "),
        ([FINE, FINE], PROCESS, "the worker group failed"),
        # a cause and what it does to others
        ([CUT_OFF, GONE], NODE, "lost 1 of 2 workers: node 01234567 is gone"),
        ([CUT_OFF, KILLED], PROCESS, "worker 1 died (killed by SIGKILL)"),
        ([CUT_OFF, OWN], USER_CODE, "ValueError: no such block"),
        ([CUT_OFF, QUIET], NODE, "lost 1 of 2 workers: node 01234567 does not answer"),
        ([STALLED, OWN], USER_CODE, "ValueError: no such block"),
        ([STALLED, KILLED], PROCESS, "worker 1 died (killed by SIGKILL)"),
        ([CUT_OFF, STALLED], PROCESS, "worker 1 made no progress for 301 s: the stacks are in the log"),
        (
            [SILENT, STOPPED],
            PROCESS,
            "worker 1 has not answered for 17 s: process 7 is stopped (SIGSTOP)",
        ),
        # two causes at a time
        ([OWN, GONE], NODE, "lost 1 of 2 workers: node 01234567 is gone"),
        ([OWN, STOPPED], PROCESS, "worker 1 has not answered for 16 s: process 7 is stopped (SIGSTOP)"),
        ([OWN, QUIET], USER_CODE, "ValueError: no such block"),
        ([OWN, KILLED], USER_CODE, "ValueError: no such block"),
        ([KILLED, QUIET], NODE, "lost 1 of 2 workers: node 01234567 does not answer"),
        ([OWN, BAD_FILE], MISTAKE, "UserError: no such folder"),
        ([GONE, BAD_FILE], MISTAKE, "UserError: no such folder"),
        ([STOPPED, BAD_FILE], MISTAKE, "UserError: no such folder"),
    ],
)
def test_classify(ranks: list[RankOutcome], kind: FailureKind, cause: str) -> None:
    failure = classify(ranks)
    assert (failure.kind, failure.cause) == (kind, cause)


def test_the_kind_does_not_depend_on_which_rank_it_was() -> None:
    outcomes = [FINE, GONE, QUIET, STOPPED, STALLED, OWN, BAD_FILE, CUT_OFF, KILLED]
    for pair in permutations(outcomes, 2):
        assert classify(pair).kind == classify(pair[::-1]).kind, pair


def test_what_the_task_raised_is_kept() -> None:
    for ranks in ([OWN, FINE], [OWN, GONE]):
        error = classify(ranks).error
        assert error is not None
        assert error["message"] == "no such block"
    mistake = classify([GONE, BAD_FILE]).error
    assert mistake is not None
    assert mistake["mistake"]["what"] == "no such folder"
    assert classify([CUT_OFF, GONE]).error is None, "a lost peer is nothing of its own"


# --- giving up ------------------------------------------------------------------------------------------------


def test_nodes_that_go_never_end_a_job_and_the_same_failure_twice_does() -> None:
    budget = Budget(max_failures=3)
    for _ in range(1000):
        budget.preempted()
    assert not budget.failed(7, "ValueError")
    assert not budget.failed(8, "ValueError"), "it got further"
    assert budget.failed(8, "ValueError"), "it would come a third time"
    many = Budget(max_failures=2)
    assert [many.failed(step, "ValueError") for step in range(3)] == [False, False, True]


def test_processes_that_die_end_a_job_only_while_it_gets_nowhere() -> None:
    budget = Budget(max_failures=0)
    for step in range(100):
        assert not budget.broke("SIGKILL")
        budget.progress(step)
    answers = [budget.broke("SIGKILL") for _ in range(MAX_STALLED_ATTEMPTS)]
    assert answers == [False] * (MAX_STALLED_ATTEMPTS - 1) + [True]
    budget.progress(99)
    assert budget.broke("SIGKILL"), "a step that was done before is not progress"


def attempts(budget: Budget, failure: Failure, step: int = 5, most: int = 100) -> int:
    """How often a job fails in the same way until it gives up; `most` if it does not."""
    return next((number for number in range(1, most) if budget.charge(failure, step)), most)


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        ([FINE, GONE], 100),
        ([FINE, QUIET], 100),
        ([CUT_OFF, GONE], 100),
        ([FINE, KILLED], MAX_STALLED_ATTEMPTS),
        ([FINE, STOPPED], MAX_STALLED_ATTEMPTS),
        ([FINE, OWN], 2),
        ([FINE, BAD_FILE], 1),
        ([GONE, BAD_FILE], 1),
        ([OWN, GONE], MAX_STALLED_ATTEMPTS),
    ],
)
def test_what_pays_for_a_failure(ranks: list[RankOutcome], number: int) -> None:
    """Also an exception that comes together with a lost node each time ends the job at last."""
    assert attempts(Budget(max_failures=3), classify(ranks)) == number


def test_an_exception_beside_a_lost_node_is_free_while_the_job_gets_on() -> None:
    budget = Budget(max_failures=0)
    for step in range(100):
        budget.progress(step)
        assert not budget.charge(classify([OWN, GONE]), step)
    assert budget.counts() == {"preempted": 100}
    assert budget.charge(classify([OWN, FINE]), 100), "its own budget is 0"
