"""Servers that a pipeline needs are asked before its first step."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.pipeline.check import probes
from orchestrator.storage.open import open_store
from orchestrator.tracking import reachable

from .checking import checked, told


@pytest.mark.parametrize("runs", [True, False])
def test_a_tracking_server_that_is_away_stops_nothing_and_is_told_at_once(
    folder: Path, closed_port: int, runs: bool
) -> None:
    found = checked(f"tracking.uri=http://127.0.0.1:{closed_port}", runs=runs)
    assert found.errors == []
    assert "does not answer" in told(found.warnings)
    assert "tracking.uri" in told(found.warnings)
    assert "publish cannot run without the model registry" in told(found.warnings)


def test_a_tracking_server_that_hangs_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_ANSWER_S", 0.2)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        found = checked(f"tracking.uri=http://127.0.0.1:{one.getsockname()[1]}")
    assert "answer" in told(found.warnings)


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Refuses) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


def test_any_answer_of_a_tracking_server_will_do(folder: Path, server: str) -> None:
    assert checked(f"tracking.uri={server}").warnings == []


def test_a_database_that_is_none(folder: Path) -> None:
    (folder / "m.db").write_text("no database at all")
    assert "is not an SQLite database" in told(checked("tracking.uri=sqlite:///m.db").warnings)
    (folder / "d.db").mkdir()
    assert "is a folder" in told(checked("tracking.uri=sqlite:///d.db").warnings)


def test_a_database_without_its_driver() -> None:
    trouble = reachable.trouble("postgresql+nodriver://host/mlflow", 1.0)
    assert "driver nodriver is not installed" in str(trouble)


def test_a_cluster_that_is_away(folder: Path, closed_port: int) -> None:
    override = f"cluster.address=127.0.0.1:{closed_port}"
    assert "no Ray cluster answers" in told(checked(override).errors)
    plan = checked(override, runs=False)
    assert plan.errors == []
    assert "no Ray cluster answers" in told(plan.warnings)


def test_a_remote_store_that_is_away(folder: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    said = told(checked("store=s3://bucket/prefix", "stages.publish.names=[smal]").errors)
    assert "does not answer" in said
    assert "'smal'" in said


def test_a_remote_store_is_written_to_and_left_as_it_was(folder: Path, s3_uri: str) -> None:
    found = checked(f"store={s3_uri}")
    assert (told(found.errors), told(found.warnings)) == ("", "")
    assert list(open_store(s3_uri).list()) == []
