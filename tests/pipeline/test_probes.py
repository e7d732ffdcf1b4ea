"""Questions to servers: what comes of one that is not answered, or cannot be asked."""

from __future__ import annotations

import threading
from http.client import BadStatusLine

import pytest

from orchestrator.errors import UserError
from orchestrator.pipeline.probes import Probe


def test_an_answer_has_its_place_in_the_file() -> None:
    away = UserError("it is away", hint="start it")
    said = str(Probe("MLflow", "toy.yaml:3  tracking.uri", lambda: away, 5.0).result())
    assert said == "it is away\n  at   toy.yaml:3  tracking.uri\n  hint start it"
    assert Probe("MLflow", "toy.yaml:3", lambda: None, 5.0).result() is None


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("it is away"), "it is away"),
        (BadStatusLine("SSH-2.0"), "MLflow could not be asked: BadStatusLine: SSH-2.0"),
        (ZeroDivisionError(), "MLflow could not be asked: ZeroDivisionError"),
    ],
)
def test_an_error_is_an_answer_and_no_traceback(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask() -> UserError | None:
        raise error

    answer = Probe("MLflow", "toy.yaml:3", ask, 5.0).result()
    assert answer is not None
    assert answer.what.startswith(said)
    assert answer.where == "toy.yaml:3"
    assert capsys.readouterr().err == ""


def test_silence_is_told_with_its_seconds() -> None:
    hangs = threading.Event()

    def ask() -> UserError | None:
        hangs.wait(10)
        return None

    answer = Probe("the store", "toy.yaml:3", ask, 0.1, hint="look").result()
    hangs.set()
    assert answer is not None
    assert (answer.what, answer.hint) == ("the store did not answer within 0 s", "look")
