"""Questions to servers: what comes of one that is not answered, or cannot be asked."""

from __future__ import annotations

import threading
from http.client import BadStatusLine
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.pipeline.check import probes
from orchestrator.pipeline.check.probes import Probe
from orchestrator.storage.local import LocalStore
from orchestrator.storage.s3_client import StoreError
from orchestrator.storage.store import CannotCopyError


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


class Odd(LocalStore):
    """Gives back something else, or takes nothing."""

    takes = True

    def put_bytes(self, name: str, data: bytes) -> None:
        if not self.takes:
            raise StoreError("access is denied")
        super().put_bytes(name, data)

    def get_bytes(self, name: str) -> bytes:
        return b"another"


def refuse(*names: object) -> None:
    raise CannotCopyError("a may not be copied")


def test_a_store_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store: LocalStore = LocalStore(tmp_path)
    monkeypatch.setattr(probes, "open_store", lambda uri, patience: store)

    def said(*, writes: bool = True) -> str | None:
        found = probes.store_trouble("s3://bucket", writes=writes)
        assert list(store.list()) == []
        return None if found is None else found.what

    assert said() is None
    assert probes.copy_trouble("s3://bucket") is None
    assert list(store.list()) == []
    monkeypatch.setattr(LocalStore, "copy", refuse)
    assert probes.copy_trouble("s3://bucket") == "a may not be copied"
    assert list(store.list()) == []
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", refuse)
        assert probes.copy_trouble("s3://bucket") == "a may not be copied"
    for name in list(store.list()):
        store.delete(name)
    store = Odd(tmp_path)
    assert said() == "the store s3://bucket does not return what was written to it"
    store.takes = False
    assert said() == "the store s3://bucket cannot be used: access is denied"
    assert said(writes=False) is None, "a plan writes nothing"
