"""An HTTP proxy that does to replies what networks and busy servers do. The faults follow a seeded plan."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

KINDS = ("500", "503", "drop", "lost", "timeout", "slow", "truncate")
_ERRORS = {"500": ("InternalError", "We encountered an internal error."), "503": ("SlowDown", "Reduce rate.")}
_HOP = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length", "date", "server")
# What is being asked: its method and its path with the query.
Matches = Callable[[str, str], bool]


class FaultyProxy:
    """Stands before the server at `upstream`, as a context manager.

    Kinds of faults: `500`, `503` (SlowDown): not passed on, answered so. `drop`: the connection is closed before
    anything is passed on; `lost`: after it was, so it happened. `timeout`: nothing is answered for `hang_s`;
    `late`: nor is here, but then all is well.
    `slow`: the body comes in drops, whole in the end. `truncate`: half a body, then the connection is closed.
    `flip`: one bit of the body differs.

    Args:
        upstream: http://host:port
        rate: share of requests that meet a fault of `kinds`, drawn from `seed`.
        hang_s: how long a `timeout` and a `late` take.
    """

    def __init__(
        self,
        upstream: str,
        *,
        rate: float = 0.0,
        kinds: Iterable[str] = KINDS,
        seed: int = 0,
        hang_s: float = 3.0,
    ) -> None:
        self.upstream = upstream
        self.rate = rate
        self.kinds = tuple(kinds)
        self.hang_s = hang_s
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self._random = random.Random(seed)
        self._script: list[tuple[str, Matches]] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next(self, *kinds: str, when: Matches = lambda method, path: True) -> None:
        """The next requests that match `when` meet these faults, one each; `` is none."""
        with self._lock:
            self._script += [(kind, when) for kind in kinds]

    def fault(self, method: str, path: str) -> str | None:
        """What happens to this request."""
        with self._lock:
            self.requests.append((method, path))
            kind: str | None = None
            for position, (scripted, when) in enumerate(self._script):
                if when(method, path):
                    del self._script[position]
                    kind = scripted
                    break
            else:
                if self._random.random() < self.rate:
                    kind = self._random.choice(self.kinds)
            if kind:
                self.injected[kind] += 1
            return kind

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = proxy.fault(self.command, self.path)
        if fault in ("timeout", "late"):
            time.sleep(proxy.hang_s)
        if fault in ("drop", "timeout"):
            self.close_connection = True
        elif fault in _ERRORS:
            self._refuse(fault)
        else:
            self._pass_on(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _refuse(self, fault: str) -> None:
        code, message = _ERRORS[fault]
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(int(fault))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection(urlsplit(self.server.proxy.upstream).netloc, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            reply = upstream.getresponse()
            data = reply.read()
        finally:
            upstream.close()
        if fault == "lost":
            self.close_connection = True
            return
        self.send_response_only(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = reply.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if length is not None and reply.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        self._send(data, fault)

    def _send(self, data: bytes, fault: str | None) -> None:
        if fault == "truncate":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "flip" and data:
            self.wfile.write(data[:-1] + bytes([data[-1] ^ 1]))
        elif fault == "slow":
            step = max(1, len(data) // 8)
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(data)
