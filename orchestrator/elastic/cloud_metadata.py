"""What a machine's cloud says about the machine's end: AWS, GCE and Azure metadata services, over plain HTTP.

Each service is asked on a link-local address, and only where it is known to be the right one: the machine's
firmware names its cloud, the user named it in the settings, or an environment variable gives the service's address
(`ORCHESTRATOR_AWS_METADATA_URL`, `ORCHESTRATOR_GCE_METADATA_URL`, `ORCHESTRATOR_AZURE_METADATA_URL`).
`ORCHESTRATOR_METADATA_POLL_S` asks more or less often than every 5 s (AWS) or 2 s.

A cloud's words are one of two things. A :class:`Notice` is the end of the machine at a known time: AWS
`spot/instance-action`, GCE `preempted` and `TERMINATE_ON_HOST_MAINTENANCE`, Azure `Preempt`, `Terminate`, `Reboot`
and `Redeploy`. A :class:`Hint` has no time and may never come true: the AWS rebalance recommendation, a GCE live
migration (the machine goes on elsewhere after less than a second), an Azure `Freeze` (it pauses for seconds).
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from orchestrator.errors import UserError

Cloud = Literal["aws", "gce", "azure"]
CLOUDS: tuple[Cloud, ...] = ("aws", "gce", "azure")

_DMI = Path("/sys/class/dmi/id")
_TIMEOUT_S = 2.0
_MOST_BYTES = 1 << 20
_TOKEN_TTL_S = 6 * 3600
# Ray ends a node at its deadline, so a deadline of this instant would leave no time for a checkpoint, and a clock
# that is a little wrong would do the same.
_SHORTEST_NOTICE_S = 2.0
# GCE gives no time. It promises 30 s after `preempted`; a poll may be late by two, and the machine needs a moment.
_GCE_PREEMPTED_S = 25.0
# The shortest promise for a host maintenance. A machine with GPUs is told an hour ahead, without saying so here.
_GCE_MAINTENANCE_S = 60.0
# Microsoft's mark on virtual machines of Azure. Its vendor string is on every Hyper-V machine.
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
_AZURE_KILLS = ("Preempt", "Terminate", "Reboot", "Redeploy")
# The three clouds share one address, which is why nobody is asked before the cloud is known.
_POLL_VARIABLE = "ORCHESTRATOR_METADATA_POLL_S"
_LINK_LOCAL = "http://169.254.169.254"


class MetadataError(Exception):
    """A metadata service did not answer, or not as its cloud documents. The next poll may find it well."""


@dataclass(frozen=True)
class Notice:
    """The end of this machine.

    Attributes:
        source: the cloud and its words, for people.
        deadline: seconds since 1970 at which the machine goes.
    """

    source: str
    deadline: float


@dataclass(frozen=True)
class Hint:
    """A machine that may go, or pause, at a time that nobody knows. Nothing is drained for it."""

    source: str


class MetadataClient(Protocol):
    """One cloud's metadata service.

    Attributes:
        cloud: which one.
        poll_s: seconds between two polls, a fraction of the shortest notice the cloud gives.
    """

    cloud: Cloud
    poll_s: float

    def poll(self) -> list[Notice | Hint]:
        """What the service says now; raises MetadataError where it cannot be believed."""
        ...


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def text(self) -> str:
        try:
            return self.body.decode().strip()
        except UnicodeDecodeError as error:
            raise MetadataError(f"an answer that is not text: {self.body[:40]!r}") from error

    def json(self) -> dict[str, Any]:
        try:
            parsed = json.loads(self.text())
        except ValueError as error:
            raise MetadataError(f"an answer that is not JSON: {self.body[:40]!r}") from error
        if not isinstance(parsed, dict):
            raise MetadataError(f"an answer that is not a JSON object: {self.body[:40]!r}")
        return parsed


class _Service:
    """HTTP to one address. No proxy and no redirect: what answers must be the machine's own service."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise UserError(
                f"a metadata service's address must be http://HOST[:PORT], not {url!r}",
                hint="correct the variable ORCHESTRATOR_…_METADATA_URL",
            )
        self._host, self._port, self._prefix = parts.hostname, parts.port or 80, parts.path.rstrip("/")

    def request(self, path: str, headers: Mapping[str, str], method: str = "GET") -> _Answer:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, f"{self._prefix}{path}", headers=dict(headers))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return _Answer(response.status, names, response.read(_MOST_BYTES))
        except (OSError, http.client.HTTPException) as error:
            raise MetadataError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()


class AwsMetadata:
    """IMDSv2 of an EC2 instance: a session token first, then two documents that are 404 until there is news."""

    cloud: Cloud = "aws"
    poll_s = 5.0  # what AWS recommends; the notice is two minutes

    def __init__(self, url: str) -> None:
        self._service = _Service(url)
        self._token = ""
        self._token_until = 0.0

    def poll(self) -> list[Notice | Hint]:
        """An interruption with its time, and a rebalance recommendation."""
        # Each of the two is given on as soon as it is known: trouble with the second must not hide the first.
        action = self._document("spot/instance-action")
        if action is not None:
            what, when = action.get("action"), _iso_time(action.get("time"))
            return [Notice(f"AWS spot/instance-action: {what}", _soon(when))]
        if self._document("events/recommendations/rebalance") is not None:
            return [Hint("AWS rebalance recommendation")]
        return []

    def _document(self, name: str) -> dict[str, Any] | None:
        answer = self._get(name)
        if answer.status == 401:
            self._token = ""  # the instance was stopped and started, or the token is older than we think
            answer = self._get(name)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise MetadataError(f"HTTP {answer.status} for {name}")
        return answer.json()

    def _get(self, name: str) -> _Answer:
        if not self._token or time.monotonic() > self._token_until:
            self._renew()
        return self._service.request(f"/latest/meta-data/{name}", {"X-aws-ec2-metadata-token": self._token})

    def _renew(self) -> None:
        header = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)}
        answer = self._service.request("/latest/api/token", header, method="PUT")
        if answer.status != 200 or not answer.text().isprintable() or not answer.text():
            raise MetadataError(f"HTTP {answer.status} and no token for PUT /latest/api/token")
        self._token, self._token_until = answer.text(), time.monotonic() + _TOKEN_TTL_S / 2


class GceMetadata:
    """The metadata server of a Compute Engine machine: two values that are always there."""

    cloud: Cloud = "gce"
    poll_s = 2.0  # the notice is 30 seconds

    def __init__(self, url: str) -> None:
        self._service = _Service(url)

    def poll(self) -> list[Notice | Hint]:
        """A preemption, and what a host maintenance will do to the machine."""
        if self._value("preempted", ("TRUE", "FALSE")) == "TRUE":
            return [Notice("GCE preempted", time.time() + _GCE_PREEMPTED_S)]
        migrates, ends = "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"
        event = self._value("maintenance-event", ("NONE", migrates, ends))
        if event == ends:
            return [Notice(f"GCE maintenance-event: {ends}", time.time() + _GCE_MAINTENANCE_S)]
        return [Hint(f"GCE maintenance-event: {migrates}")] if event == migrates else []

    def _value(self, name: str, known: tuple[str, ...]) -> str:
        path = f"/computeMetadata/v1/instance/{name}"
        answer = self._service.request(path, {"Metadata-Flavor": "Google"})
        if answer.status == 404:
            return ""  # not every kind of machine has both
        if answer.status != 200 or answer.headers.get("metadata-flavor") != "Google":
            raise MetadataError(f"HTTP {answer.status} for {name}, and not from Google's server")
        if answer.text() not in known:
            raise MetadataError(f"{name} is {answer.text()[:40]!r}, not one of {', '.join(known)}")
        return answer.text()


class AzureMetadata:
    """Scheduled events of an Azure machine. They name the machines they are for: a scale set sees its peers' too."""

    cloud: Cloud = "azure"
    poll_s = 2.0  # the shortest notice, for Preempt, is 30 seconds

    def __init__(self, url: str) -> None:
        self._service = _Service(url)
        self._name = ""

    def poll(self) -> list[Notice | Hint]:
        """Events that are for this machine, and neither over nor called off."""
        events = self._get("/metadata/scheduledevents?api-version=2020-07-01").json().get("Events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise MetadataError("scheduled events without a list `Events`")
        if not events:
            return []
        if not self._name:
            self._name = self._get(
                "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            ).text()
        found: list[Notice | Hint] = []
        broken: MetadataError | None = None
        for event in events:
            try:
                found += self._read(event) if self._is_ours(event) else []
            except MetadataError as error:
                broken = error  # one event that cannot be read does not hide another
        if broken is not None and not found:
            raise broken
        return found

    def _is_ours(self, event: dict[str, Any]) -> bool:
        resources = event.get("Resources")
        if not isinstance(resources, list):
            raise MetadataError("a scheduled event without a list `Resources`")
        # Names of machines do not depend on case in Azure.
        names = [str(name).lower() for name in resources]
        return self._name.lower() in names and event.get("EventStatus") in ("Scheduled", "Started")

    def _read(self, event: dict[str, Any]) -> list[Notice | Hint]:
        kind, source = event.get("EventType"), f"Azure scheduled event: {event.get('EventType')}"
        if kind in _AZURE_KILLS:
            # `NotBefore` is empty once the event has begun.
            when = event.get("NotBefore")
            return [Notice(source, _soon(_http_time(when) if when else time.time()))]
        return [Hint(source)] if kind == "Freeze" else []

    def _get(self, path: str) -> _Answer:
        answer = self._service.request(path, {"Metadata": "true"})
        if answer.status != 200:
            raise MetadataError(f"HTTP {answer.status} for {path.partition('?')[0]}")
        return answer


def detect_cloud(environ: Mapping[str, str] | None = None, dmi: Path = _DMI) -> Cloud | None:
    """The cloud this machine belongs to, from an address in the environment or else its firmware; asks no service."""
    environ = os.environ if environ is None else environ
    for cloud in CLOUDS:
        if environ.get(_variable(cloud)):
            return cloud
    vendor = f"{_firmware(dmi, 'sys_vendor')} {_firmware(dmi, 'bios_vendor')}"
    if "Amazon EC2" in vendor or "amazon" in _firmware(dmi, "bios_version"):
        return "aws"
    if "Google" in vendor and "Google Compute Engine" in _firmware(dmi, "product_name"):
        return "gce"
    if "Microsoft Corporation" in vendor and _firmware(dmi, "chassis_asset_tag") == _AZURE_ASSET_TAG:
        return "azure"
    return None


def metadata_client(cloud: Cloud, environ: Mapping[str, str] | None = None) -> MetadataClient:
    """A client of that cloud's service, at its address in the environment or else the cloud's own.

    Raises:
        UserError: the address in the environment is not an http address, or its seconds are not a number.
    """
    environ = os.environ if environ is None else environ
    url = environ.get(_variable(cloud)) or _LINK_LOCAL
    kinds: dict[Cloud, Callable[[str], MetadataClient]] = {
        "aws": AwsMetadata,
        "gce": GceMetadata,
        "azure": AzureMetadata,
    }
    client = kinds[cloud](url)
    try:
        client.poll_s = float(environ.get(_POLL_VARIABLE) or client.poll_s)
    except ValueError as error:
        raise UserError(f"{_POLL_VARIABLE} must be seconds, not {environ[_POLL_VARIABLE]!r}") from error
    return client


def _variable(cloud: Cloud) -> str:
    return f"ORCHESTRATOR_{cloud.upper()}_METADATA_URL"


def _firmware(dmi: Path, name: str) -> str:
    try:
        return (dmi / name).read_text(errors="replace").strip()
    except OSError:
        return ""


def _soon(when: float) -> float:
    return max(when, time.time() + _SHORTEST_NOTICE_S)


def _iso_time(value: object) -> float:
    try:
        parsed = datetime.fromisoformat(str(value))
    except ValueError as error:
        raise MetadataError(f"not a time: {value!r}") from error
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def _http_time(value: object) -> float:
    try:
        parsed = parsedate_to_datetime(str(value))
    except ValueError as error:
        raise MetadataError(f"not a time: {value!r}") from error
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
