"""The metadata services of three clouds on loopback, as strict as the real ones: no token or header, no answer."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit


class MetadataServer:
    """One service; use it as a context manager.

    Attributes:
        url: http://127.0.0.1:PORT, for `ORCHESTRATOR_…_METADATA_URL`.
        served: `METHOD path → status` of each request so far.
        broken: what it does in the place of answering: nothing at all, an error 503, or text that is not a document.
        said: the documents; tests change them.
        signs: whether replies carry Google's mark, by which its server is known.
    """

    protocol: ClassVar[type[BaseHTTPRequestHandler]]

    def __init__(self) -> None:
        self.served: list[tuple[str, str, int]] = []
        self.broken: str | None = None
        self.said: dict[str, Any] = {}
        self.token = "a-token"
        self.signs = True
        self._release = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.protocol)
        self._server.daemon_threads = True
        self._server.metadata = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, path: str, status: int = 200) -> int:
        """How many requests to `path` were answered with `status`."""
        return sum(known == path and code == status for _, known, code in self.served)

    def wait_released(self) -> None:
        self._release.wait(30)

    def __enter__(self) -> MetadataServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def metadata(self) -> MetadataServer:
        server: MetadataServer = self.server.metadata  # type: ignore[attr-defined]
        return server

    def reply(self, status: int, body: str = "", **headers: str) -> None:
        path = urlsplit(self.path).path
        self.metadata.served.append((self.command, path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def is_broken(self) -> bool:
        how = self.metadata.broken
        if how == "silent":
            self.metadata.served.append((self.command, urlsplit(self.path).path, 0))
            self.metadata.wait_released()
        elif how == "error":
            self.reply(503)
        elif how == "garbage":
            self.reply(200, "<html>not what you asked for</html>", Metadata_Flavor="Google")
        return how is not None


class _Aws(_Handler):
    def do_PUT(self) -> None:
        if self.is_broken():
            return
        seconds = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path != "/latest/api/token" or not seconds.isdigit() or not 1 <= int(seconds) <= 21600:
            self.reply(400)
        else:
            self.reply(200, self.metadata.token)

    def do_GET(self) -> None:
        if self.is_broken():
            return
        said = self.metadata.said.get(self.path.removeprefix("/latest/meta-data/"))
        if self.headers.get("X-aws-ec2-metadata-token") != self.metadata.token:
            self.reply(401)
        elif said is None:
            self.reply(404)
        else:
            self.reply(200, said if isinstance(said, str) else json.dumps(said))


class AwsServer(MetadataServer):
    """IMDSv2; 404 until something is announced."""

    protocol = _Aws

    def interrupt(self, in_s: float) -> float:
        """Announce a spot interruption; returns its time, in seconds since 1970."""
        when = round(time.time() + in_s)
        text = datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.said["spot/instance-action"] = {"action": "terminate", "time": text}
        return float(when)

    def recommend_rebalance(self) -> None:
        text = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.said["events/recommendations/rebalance"] = {"noticeTime": text}


class _Gce(_Handler):
    def do_GET(self) -> None:
        if self.is_broken():
            return
        value = self.metadata.said.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
        if self.headers.get("Metadata-Flavor") != "Google":
            self.reply(403, "Missing Metadata-Flavor:Google header.")
        elif value is None:
            self.reply(404, Metadata_Flavor="Google")
        else:
            flavor = {"Metadata_Flavor": "Google"} if self.metadata.signs else {}
            self.reply(200, value, **flavor)


class GceServer(MetadataServer):
    """Two values that are always there."""

    protocol = _Gce

    def __init__(self) -> None:
        super().__init__()
        self.said = {"preempted": "FALSE", "maintenance-event": "NONE"}


class _Azure(_Handler):
    def do_GET(self) -> None:
        if self.is_broken():
            return
        parts = urlsplit(self.path)
        if self.headers.get("Metadata") != "true" or "api-version" not in parse_qs(parts.query):
            self.reply(400, json.dumps({"error": "Bad request. Required metadata header not specified"}))
        elif parts.path == "/metadata/instance/compute/name":
            self.reply(200, self.metadata.said["name"])
        elif parts.path == "/metadata/scheduledevents":
            self.reply(200, json.dumps({"DocumentIncarnation": 1, "Events": self.metadata.said["events"]}))
        else:
            self.reply(404)


class AzureServer(MetadataServer):
    """Scheduled events of the machine `spot_3`, in a scale set that has others."""

    protocol = _Azure

    def __init__(self) -> None:
        super().__init__()
        self.said = {"name": "spot_3", "events": []}

    def schedule(self, kind: str, in_s: float, machine: str = "spot_3", status: str = "Scheduled") -> float:
        """Add an event; returns its time, in seconds since 1970."""
        when = round(time.time() + in_s)
        text = format_datetime(datetime.fromtimestamp(when, UTC), usegmt=True)
        self.said["events"].append(
            {
                "EventId": f"{kind}-{machine}",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": [machine],
                "EventStatus": status,
                "NotBefore": text if status == "Scheduled" else "",
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )
        return float(when)
