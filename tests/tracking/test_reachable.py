"""Whether MLflow answers, in the words that a run uses when it does not."""

from __future__ import annotations

import errno
import http.server
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import BadStatusLine, RemoteDisconnected
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ports import free_port

from orchestrator.tracking import outage, reachable


class _Answers(http.server.BaseHTTPRequestHandler):
    status: ClassVar[int] = 200

    def do_GET(self) -> None:
        self.send_error(self.status)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


def said(uri: str) -> str:
    found = reachable.trouble(uri, 2.0)
    return "" if found is None else found.what


@pytest.mark.parametrize(("status", "why"), [(200, ""), (404, ""), (401, ""), (503, "status 503")])
def test_any_answer_will_do_but_for_the_servers_own_trouble(
    server: str, status: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Answers, "status", status)
    assert said(server) == (f"MLflow at {server} does not answer ({why})" if why else "")


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_closed_port_is_told_as_a_run_tells_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.tracking.reachable.importlib.util.find_spec", lambda name: name)
    uri = f"{scheme}://127.0.0.1:{free_port()}"
    found = reachable.trouble(uri, 2.0)
    assert found == outage.trouble(uri, ConnectionRefusedError())
    assert found is not None
    assert "(connection refused)" in found.what


def test_a_host_that_no_way_leads_to_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError(OSError(errno.EHOSTUNREACH, "No route to host")) from OSError(
            errno.EHOSTUNREACH, "No route to host"
        )

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    assert said("http://mlflow:5000") == "MLflow at http://mlflow:5000 does not answer (No route to host)"


@pytest.mark.parametrize("uri", [f"http://{'a' * 70}.example:5000", "http://mlflow:port"])
def test_an_address_that_is_none_does_not_answer(uri: str) -> None:
    assert "does not answer (" in said(uri)


@pytest.mark.parametrize(
    ("greeting", "start"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "the server at {} is not an HTTP server"),
        (b"", "MLflow at {} does not answer ("),
    ],
)
def test_another_kind_of_server_is_told_from_one_that_is_away(greeting: bytes, start: str) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        uri = f"http://127.0.0.1:{one.getsockname()[1]}"

        def greet() -> None:
            other, _ = one.accept()
            other.recv(4096)
            other.sendall(greeting)
            other.close()

        threading.Thread(target=greet, daemon=True).start()
        found = reachable.trouble(uri, 5.0)
    assert found is not None
    assert found.what.startswith(start.format(uri))


def test_what_is_no_http_server_is_told_the_same_way_in_a_run() -> None:
    lost = RuntimeError("API request failed with exception ('Connection aborted.', BadStatusLine('SSH-2.0'))")
    lost.__cause__ = BadStatusLine("SSH-2.0")
    assert "is not an HTTP server" in outage.trouble("http://mlflow:22", lost).what
    lost.__cause__ = RemoteDisconnected("Remote end closed connection without response")
    assert "does not answer" in outage.trouble("http://mlflow:22", lost).what


def test_a_database_that_can_be_made_or_used_is_fine(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    (tmp_path / "used.db").write_bytes(b"SQLite format 3\0 and more")
    for name in ("empty.db", "used.db", "not/there/yet.db"):
        assert said(f"sqlite:///{tmp_path}/{name}") == ""


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "text.db").write_text("no database at all")
    where = f"sqlite:///{tmp_path}"
    assert said(f"{where}/folder.db") == f"the tracking database {tmp_path}/folder.db is a folder"
    assert said(f"{where}/text.db") == f"the tracking database {tmp_path}/text.db is not an SQLite database"
    assert "cannot be opened (Not a directory)" in said(f"{where}/text.db/below.db")


def test_a_pipe_in_place_of_a_database_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mlflow.db")
    assert "not a regular file" in said(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.parametrize("name", ["used.db", "new.db"])
def test_a_database_that_cannot_be_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used.db").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert (
        said(f"sqlite:///{tmp_path}/{name}") == f"the tracking database {tmp_path}/{name} cannot be written"
    )


def test_a_driver_that_is_not_installed() -> None:
    found = reachable.trouble("mysql+nodriver://host/mlflow", 1.0)
    assert found is not None
    assert "its driver nodriver is not installed" in found.what
    assert "mysql+DRIVER://" in found.cure
