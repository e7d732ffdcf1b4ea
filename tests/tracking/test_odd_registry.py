"""Registries and servers in states that no MLflow leaves by itself: one error that says so, and nothing is lost."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.errors import Stopped, UserError
from orchestrator.tracking import connect, download, patience, registry
from orchestrator.tracking.run import SpooledRun, Tracking

from .test_publish_faults import model


@pytest.fixture
def run(start: Callable[[], Tracking]) -> SpooledRun:
    return start().run("one")


def change(uri: str, statement: str) -> None:
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute(statement)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE model_versions SET current_stage = 'Deleted_Internal'", "was deleted"),
        ("DELETE FROM model_version_tags WHERE 0", ""),
        ("UPDATE model_versions SET status = 'FAILED_REGISTRATION'", "was not finished"),
        ("UPDATE model_versions SET source = '', storage_location = ''", "was not finished"),
        ("UPDATE model_versions SET source = NULL, storage_location = NULL", "was not finished"),
        ("UPDATE model_versions SET source = 'http://127.0.0.1:1/x', storage_location = NULL", "cannot pull"),
    ],
)
def test_versions_in_odd_states_are_not_pulled(
    run: SpooledRun, uri: str, tmp_path: Path, statement: str, said: str
) -> None:
    registry.publish(run, "vit", model(tmp_path / "model"), {}, "best")
    change(uri, statement)
    if not said:
        assert download.pull("vit@best", tmp_path / "out", uri).is_dir()
        return
    with pytest.raises(UserError, match=said) as caught:
        download.pull("vit@best", tmp_path / "out", uri)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["1" * 25, "-1", "1.0", "²"])
def test_a_version_is_a_number(run: SpooledRun, uri: str, tmp_path: Path, which: str) -> None:
    registry.publish(run, "vit", model(tmp_path / "model"), {}, "best")
    with pytest.raises(UserError, match="has no version") as caught:
        download.pull(f"vit/{which}", tmp_path / "out", uri)
    assert "vit@best" in (caught.value.hint or "")


def test_a_version_that_was_made_twice_is_one_in_the_end(
    run: SpooledRun, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a reply is lost, MLflow's client asks again, and the registry makes another version."""
    real = MlflowClient.create_model_version

    def thrice(self: MlflowClient, *args: Any, **options: Any) -> Any:
        return [real(self, *args, **options) for _ in range(3)][-1]

    monkeypatch.setattr(MlflowClient, "create_model_version", thrice)
    version = registry.publish(run, "vit", model(tmp_path / "model"), {"a": "b"}, "best")
    client = MlflowClient(uri, uri)
    assert [int(one.version) for one in client.search_model_versions("name = 'vit'")] == [version]
    monkeypatch.undo()
    other = registry.publish(run, "vit", model(tmp_path / "other", 2.0), {"a": "b"}, "best")
    assert {int(one.version) for one in client.search_model_versions("name = 'vit'")} == {version, other}


# --- servers that are none ----------------------------------------------------------------------------------------


class _Odd(BaseHTTPRequestHandler):
    answer: bytes = b"{}"
    status = 200
    headers_of: dict[str, str] = {}  # noqa: RUF012
    hangs: threading.Event | None = None

    def _reply(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hangs is not None:
            self.hangs.wait(60)
        self.send_response(self.status)
        for name, value in self.headers_of.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    do_GET = do_POST = do_PATCH = _reply

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    servers: list[ThreadingHTTPServer] = []

    def serve(**how: object) -> str:
        one = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Odd,), how))
        servers.append(one)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{one.server_port}"

    yield serve
    for one in servers:
        one.shutdown()


@pytest.mark.parametrize("answer", [b"{}", b"", b"null", b"[]", b"<html>Sign in</html>"])
def test_an_answer_without_an_id_is_an_outage_and_nothing_is_lost(
    server: Callable[..., str], uri: str, tmp_path: Path, answer: bytes
) -> None:
    spool = tmp_path / "spool"
    tracking = Tracking(server(answer=answer), "food", spool)
    one = tracking.run("one")
    one.params({"steps": 3})
    deadline = time.monotonic() + 60
    while (outage := one.outage()) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert one.mlflow_run_id(0.5) is None
    tracking.close(timeout=0.5)
    assert outage is not None
    # What was recorded is sent once a server is there that gives ids.
    later = Tracking(uri, "food", spool)
    later.run("one", resume_id=one.run_id)
    assert later.close(timeout=60)
    (found,) = connect.connect(uri).search_runs(["1"])
    assert found.data.params == {"steps": "3"}


def test_a_server_that_says_in_an_hour_is_not_waited_for(server: Callable[..., str]) -> None:
    uri = server(status=429, headers_of={"Retry-After": "3600"})
    done = threading.Event()

    def ask() -> None:
        with pytest.raises(UserError, match="registry"):
            registry.difference(uri, "vit", "0" * 64, {}, "best")
        done.set()

    threading.Thread(target=ask, daemon=True).start()
    assert done.wait(60), "it waits as long as the server says"


def test_a_stop_is_heard_while_mlflow_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    stop, ends = threading.Event(), threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        patience.interruptibly(lambda: ends.wait(600), "http://mlflow", stop, "publishing vit")
    ends.set()


def test_slowness_is_told_with_its_time(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "_FIRST_S", 0.1)
    with caplog.at_level("WARNING", "orchestrator"):
        assert (
            patience.interruptibly(lambda: time.sleep(1) or 3, "http://u:secret@h", None, "publishing vit")
            == 3
        )
    (line,) = [record.getMessage() for record in caplog.records]
    assert "publishing vit" in line
    assert "has not answered since" in line
    assert "secret" not in line
    with pytest.raises(ZeroDivisionError):
        patience.interruptibly(lambda: 1 / 0, "http://h", None, "publishing vit")


def test_mlflow_is_given_limits() -> None:
    environment = connect._environment()
    assert environment["MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER"] == "false"
    assert float(environment["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 60
