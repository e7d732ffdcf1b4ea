"""Compares the locked packages with the known vulnerabilities of https://osv.dev; `make audit` runs it.

Exit status 0: there are none but those that .ci/audit.toml allows; or the service cannot be reached, or has an error of
its own (5xx), which is one line. Packages that pip-audit does not look at are named.
Exit status 1: there are others, or the audit itself is broken.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = ROOT / ".ci" / "audit.toml"
# It holds all packages of requirements.lock, in the same versions.
LOCK = ROOT / "requirements-dev.lock"
_ANSWER_S = 5
_ALL_S = 180
# What pip-audit ends with when it gets no connection or no answer, and what it says of a connection that is too slow.
_AWAY = (
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "Timeout",
    "ProxyError",
    "SSLError",
    "ChunkedEncodingError",
)
_TOO_SLOW = "Could not connect to OSV's vulnerability feed"
_REPLY = re.compile(r"HTTPError: (\d{3} .*)")


class NotAuditedError(Exception):
    """The service gave no answer; says why."""


class BrokenError(Exception):
    """The audit cannot be made, and that is not the network's fault; says why."""


@dataclass(frozen=True)
class Known:
    """A known vulnerability of a locked package: all its names, and the versions that fix it."""

    package: str
    version: str
    ids: tuple[str, ...]
    fixed_in: tuple[str, ...]

    def __str__(self) -> str:
        others = f" ({', '.join(self.ids[1:])})" if len(self.ids) > 1 else ""
        fixed = f"fixed in {', '.join(self.fixed_in)}" if self.fixed_in else "not fixed yet"
        return f"{self.package} {self.version}: {self.ids[0]}{others}, {fixed}"


@dataclass(frozen=True)
class Allowed:
    """An entry of .ci/audit.toml."""

    id: str
    reason: str
    until: datetime.date


def allowed(text: str) -> list[Allowed]:
    """The entries of the file's `text`.

    Raises:
        BrokenError: it is not TOML, or an entry lacks its id, reason or date.
    """
    try:
        entries = tomllib.loads(text).get("allow", [])
        found = [Allowed(entry["id"], entry["reason"], entry["until"]) for entry in entries]
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BrokenError(f"{ALLOWED.name}: each [[allow]] has id, reason and until: {error}") from None
    for one in found:
        if not one.id or not str(one.reason).strip() or type(one.until) is not datetime.date:
            raise BrokenError(
                f"{ALLOWED.name}: {one.id or 'an entry'} has no reason, or `until` is not a date"
            )
    return found


def ask(lock: Path, service: str | None = None) -> dict[str, Any]:
    """What pip-audit reports of the packages in `lock`, as its JSON.

    Args:
        lock: a file of requirements with exact versions. Nothing in it is installed or resolved.
        service: the address of another service that speaks OSV's protocol.

    Raises:
        NotAuditedError: the service gave no answer.
        BrokenError: pip-audit failed otherwise.
    """
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--timeout", str(_ANSWER_S)]
    command += ["--progress-spinner", "off", "--format", "json", "--aliases", "on", "--desc", "off"]
    command += ["--osv-url", service] if service else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotAuditedError(f"no complete answer within {_ALL_S} s") from None
    try:
        report: dict[str, Any] = json.loads(done.stdout)
        return report
    except ValueError:
        raise _failure(done.stderr) from None


def _failure(said: str) -> Exception:
    """What an end of pip-audit without a report is, by its traceback: an answer like "no such page" is our mistake."""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    kind = last.partition(":")[0].rpartition(".")[2]
    if kind in _AWAY or _TOO_SLOW in said:
        return NotAuditedError((_TOO_SLOW if _TOO_SLOW in said else last)[:200])
    reply = _REPLY.search(said) if kind == "ServiceError" else None
    if reply is not None and reply[1].startswith("5"):
        return NotAuditedError(reply[1][:200])
    return BrokenError(f"pip-audit failed: {(last if reply is None else reply[1])[:500]}")


def known(report: dict[str, Any]) -> Iterator[Known]:
    """The vulnerabilities in a report of pip-audit."""
    for package in report["dependencies"]:
        for one in package.get("vulns", ()):
            ids = (one["id"], *one.get("aliases", ()))
            yield Known(package["name"], package["version"], ids, tuple(one["fix_versions"]))


def skipped(report: dict[str, Any]) -> dict[str, str]:
    """The packages that pip-audit did not look at, with its reasons."""
    return {one["name"]: one["skip_reason"] for one in report["dependencies"] if "skip_reason" in one}


def main(arguments: Sequence[str] = (), today: datetime.date | None = None) -> int:
    """Audit the lock file, or the one named first in `arguments`; returns the exit status."""
    lock = Path(arguments[0]) if arguments else LOCK
    day = today or datetime.datetime.now(datetime.UTC).date()
    try:
        passes = allowed(ALLOWED.read_text(encoding="utf-8"))
        report = ask(lock, os.environ.get("AUDIT_OSV_URL"))
    except NotAuditedError as error:
        _say(f"not audited: {error}")
        return 0
    except (BrokenError, OSError) as error:
        _say(f"audit: {error}")
        return 1
    found = list(known(report))
    reasons = {one.id: one.reason for one in passes if one.until >= day}
    bad = 0
    for one in found:
        reason = next((reasons[name] for name in one.ids if name in reasons), None)
        bad += reason is None
        _say(f"{one}: {'NOT ALLOWED' if reason is None else f'allowed, {reason}'}")
    seen = {name for one in found for name in one.ids}
    for entry in passes:
        if entry.id not in seen:
            _say(f"{entry.id} in {ALLOWED.name} is not needed any more")
    for name, why in skipped(report).items():
        _say(f"{name} was not audited: {why}")
    _say(f"audited {lock.name}: {len(found)} known vulnerabilities, {bad} of them not allowed")
    return 1 if bad else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
