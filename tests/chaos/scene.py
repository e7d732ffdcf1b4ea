"""What a storm happens in: photographs, an S3 server behind a faulty proxy, an MLflow server, a spot market.

All of it is real, and all processes below it carry a mark in their environment, so that none can be overlooked.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from faulty_proxy import FaultyProxy, _Handler
from ports import free_port
from s3_server import _FOREIGN, S3Server

from tools.market import SpotMarket

MARK = "ORCHESTRATOR_CHAOS"
BUCKET = "storm"

_port_here = threading.local()


class Trap:
    """Waits for one request and kills whoever makes it.

    Attributes:
        sprung: once it has: the request's path, the process that was killed, and when.
    """

    def __init__(self, method: str, path: str, pids: Callable[[], set[int]], reply: str | None) -> None:
        self.sprung: tuple[str, int, float] | None = None
        self.happened = threading.Event()
        self._method, self._path, self._pids, self._reply = method, re.compile(path), pids, reply
        self._one = threading.Lock()

    def check(self, method: str, path: str) -> tuple[bool, str | None]:
        """Whether it springs now, and what then becomes of the request: `drop` it, or pass it on."""
        if method != self._method or not self._path.search(path):
            return False, None
        with self._one:
            if self.happened.is_set():
                return False, None
            pid = _owner(_port_here.number, self._pids())
            if pid is None:
                return False, None
            os.kill(pid, signal.SIGKILL)
            self.sprung = (path, pid, time.time())
            self.happened.set()
        return True, self._reply


class StormProxy(FaultyProxy):
    """A faulty proxy that can also kill a client in the middle of its request.

    Attributes:
        trap: is set for the next matching request.
    """

    def __init__(self, upstream: str, *, seed: int) -> None:
        super().__init__(upstream, seed=seed, hang_s=4.0)
        self._server.RequestHandlerClass = _Knowing
        self.trap: Trap | None = None

    def fault(self, method: str, path: str) -> str | None:
        """See the base class."""
        trap = self.trap
        if trap is not None:
            sprung, reply = trap.check(method, path)
            if sprung:
                self.trap = None
                return reply
        return super().fault(method, path)


class _Knowing(_Handler):
    """Remembers who asks."""

    def _with_port(self) -> None:
        _port_here.number = self.client_address[1]
        self._handle()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _with_port


def _owner(port: int, pids: set[int]) -> int | None:
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            if any(one.laddr.port == port for one in psutil.Process(pid).net_connections("tcp")):
                return pid
    return None


class TrackingServer:
    """`mlflow server` over SQLite, as a process group that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.database = folder / "mlflow.db"
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it answers some seconds later."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
        places = ["--backend-store-uri", f"sqlite:///{self.database}"]
        places += ["--artifacts-destination", str(self.folder / "files")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *places],
                env={**os.environ, **quiet},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds: float = 180.0) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """SIGKILL it with all its workers."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


@dataclass
class Scene:
    """The surroundings, while they last. What is pushed to `ending` is done before they go."""

    folder: Path
    mark: str
    s3: S3Server
    proxy: StormProxy
    tracking: TrackingServer
    market: SpotMarket
    ending: contextlib.ExitStack

    def processes(self) -> list[psutil.Process]:
        """Every process that carries the scene's mark."""
        return marked(self.mark)

    def client(self) -> Any:
        """A client of the real server, past the proxy."""
        return self.s3.client()


def marked(mark: str) -> list[psutil.Process]:
    """Every process with this mark in the environment it was started with."""
    found = []
    needle = f"{MARK}={mark}".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
            if needle in environment.split(b"\0") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@contextlib.contextmanager
def scene(folder: Path, seed: int) -> Iterator[Scene]:
    """Set everything up, with no machine but the head, and clear it away."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    with contextlib.ExitStack() as stack:
        (folder / "s3").mkdir()
        server = S3Server(folder / "s3")
        # Without SPT_NOENV Ray's workers overwrite their environment with their title.
        stack.enter_context(_environment({MARK: mark, "SPT_NOENV": "1"}))
        stack.enter_context(server)
        server.make_bucket(BUCKET)
        proxy = stack.enter_context(StormProxy(server.endpoint, seed=seed))
        # Workers inherit the environment of the raylets, not that of the driver.
        ours = {**server.environment(proxy.endpoint), "ORCHESTRATOR_CACHE": str(folder / "cache")}
        stack.enter_context(_environment(ours))
        tracking = TrackingServer(folder / "mlflow")
        tracking.start()
        stack.callback(tracking.kill)
        market = stack.enter_context(SpotMarket())
        tracking.wait()
        yield Scene(folder, mark, server, proxy, tracking, market, stack)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    names = [*values, *_FOREIGN]
    before = {name: os.environ.get(name) for name in names}
    for name in _FOREIGN:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
