"""`mlflow server` for tests, on loopback: over SQLite or PostgreSQL, with its artifacts in a folder or on S3."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ports import free_port

_UP_S = 240.0


@contextlib.contextmanager
def mlflow_server(folder: Path, backend: str, artifacts: str, port: int | None = None) -> Iterator[str]:
    """The address of a server that answers, until the `with` block ends.

    Args:
        folder: for its log.
        backend: the database's address.
        artifacts: a folder or `s3://…`, which the server alone reads and writes.
        port: where it listens; default: a free one.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    endpoint = {"MLFLOW_S3_ENDPOINT_URL": os.environ.get("AWS_ENDPOINT_URL", "")}
    checksums = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    with (folder / "mlflow.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, *places],
            env={**os.environ, **quiet, **endpoint, **checksums, "PATH": path},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "mlflow.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _UP_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


def why_no_postgres() -> str | None:
    """What PostgreSQL lacks here to be tested with, or None."""
    if _binary("initdb") is None or _binary("postgres") is None:
        return "PostgreSQL's server is not installed"
    if importlib.util.find_spec("psycopg2") is None:
        return "PostgreSQL's driver is not installed: pip install psycopg2-binary"
    if os.geteuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The address of an empty database on a throw-away server, until the `with` block ends."""
    # PostgreSQL refuses to run as root, and whom it runs as cannot see into pytest's folders.
    user = "postgres" if os.geteuid() == 0 else None
    data = Path(tempfile.mkdtemp(prefix="postgres-"))
    if user is not None:
        shutil.chown(data, user)
    port = free_port()
    with (folder / "postgres.log").open("ab") as log:
        initdb = [_binary("initdb"), "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync"]
        subprocess.run(initdb, user=user, cwd=data, stdout=log, stderr=log, check=True)
        options = ["-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
        process = subprocess.Popen(
            [_binary("postgres"), "-D", str(data), *options], user=user, cwd=data, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _UP_S
        while "ready to accept connections" not in (folder / "postgres.log").read_text():
            assert process.poll() is None, (folder / "postgres.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(data, ignore_errors=True)


def _binary(name: str) -> str | None:
    found = shutil.which(name)
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return found or (str(installed[-1]) if installed else None)
