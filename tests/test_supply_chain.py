"""The audit of the lock file against a service that speaks OSV's protocol, and the software bill of materials."""

from __future__ import annotations

import datetime
import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from ports import free_port

ROOT = Path(__file__).parents[1]
TODAY = datetime.date(2026, 6, 1)
FLAW = {
    "id": "GHSA-aaaa-bbbb-cccc",
    "aliases": ["CVE-2026-1"],
    "summary": "It does what it should not.",
    "published": "2026-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"name": "holey", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}],
        }
    ],
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


audit, sbom = script("audit"), script("sbom")


class _Osv(BaseHTTPRequestHandler):
    code: ClassVar[int] = 200

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps({"vulns": [FLAW]} if asked["package"]["name"] == "holey" else {}).encode()
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("pip_audit", reason="the lock's pip-audit is not installed: make setup-dev")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AUDIT_OSV_URL", f"http://127.0.0.1:{server.server_address[1]}/v1/query")
    yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file with a package that has a known flaw; nothing is allowed."""
    monkeypatch.setattr(audit, "ALLOWED", tmp_path / "audit.toml")
    audit.ALLOWED.write_text("")
    path = tmp_path / "requirements.lock"
    path.write_text("fine==1.0\n    # via holey\nholey==1.5 ; sys_platform == 'linux'\n")
    return path


def said(lock: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return audit.main([str(lock)], TODAY), capsys.readouterr().out


def allow(id: str, until: str = "2026-06-01", reason: str = "the hole is not reached") -> None:
    audit.ALLOWED.write_text(f'[[allow]]\nid = "{id}"\nreason = "{reason}"\nuntil = {until}\n')


@pytest.mark.heavy
@pytest.mark.usefixtures("service")
def test_a_known_flaw_fails_unless_it_is_allowed_and_only_until_its_day(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "holey 1.5: CVE-2026-1 (GHSA-aaaa-bbbb-cccc), fixed in 2.0: NOT ALLOWED"
    status, out = said(lock, capsys)
    assert (status, line in out) == (1, True), out
    allow("CVE-2026-1")
    status, out = said(lock, capsys)
    assert (status, "allowed, the hole is not reached" in out) == (0, True), out
    allow("CVE-2026-1", until="2026-05-31")
    assert said(lock, capsys)[0] == 1
    lock.write_text("fine==1.0\n")
    status, out = said(lock, capsys)
    assert status == 0
    assert "CVE-2026-1 in audit.toml is not needed any more" in out


@pytest.mark.heavy
def test_no_network_is_one_line_and_no_failure(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pip_audit", reason="the lock's pip-audit is not installed: make setup-dev")
    monkeypatch.setenv("AUDIT_OSV_URL", f"http://127.0.0.1:{free_port()}/v1/query")
    status, out = said(lock, capsys)
    assert status == 0
    assert out.startswith("not audited: ")
    assert out.count("\n") == 1


@pytest.mark.heavy
@pytest.mark.usefixtures("service")
@pytest.mark.parametrize(
    ("code", "status", "line"),
    [
        (400, 1, "audit: pip-audit failed: 400 Client Error"),
        (404, 1, "audit: pip-audit failed: 404 Client Error"),
        (503, 0, "not audited: 503 Server Error"),
    ],
)
def test_an_answer_that_says_we_ask_wrongly_is_a_failure_and_the_services_own_trouble_is_none(
    lock: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    status: int,
    line: str,
) -> None:
    monkeypatch.setattr(_Osv, "code", code)
    found, out = said(lock, capsys)
    assert (found, out.startswith(line), out.count("\n")) == (status, True, 1), out


@pytest.mark.parametrize(
    ("last", "away"),
    [
        ("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='x'): NameResolutionError", True),
        ("requests.exceptions.ReadTimeout: HTTPSConnectionPool(host='x'): Read timed out.", True),
        ("ERROR: Could not connect to OSV's vulnerability feed\nERROR: Tip: try another service", True),
        ("pip_audit._service.interface.ServiceError: Failed to query the pip cache", False),
        ("ValueError: not a ConnectionError", False),
        ("", False),
    ],
)
def test_what_counts_as_no_network(last: str, away: bool) -> None:
    expected = audit.NotAuditedError if away else audit.BrokenError
    assert type(audit._failure(f"Traceback (most recent call last):\n{last}\n" if last else "")) is expected


def test_what_is_not_looked_at_is_named(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = {"dependencies": [{"name": "odd", "skip_reason": "it has no version"}]}
    monkeypatch.setattr(audit, "ask", lambda lock, service: report)
    status, out = said(lock, capsys)
    assert (status, "odd was not audited: it has no version" in out) == (0, True), out


@pytest.mark.heavy
@pytest.mark.usefixtures("service")
def test_a_lock_that_cannot_be_read_is_a_failure(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock.write_text("holey\n")
    status, out = said(lock, capsys)
    assert (status, out.startswith("audit: pip-audit failed: ")) == (1, True), out


@pytest.mark.parametrize(
    "text",
    ["[[allow", '[[allow]]\nid = "CVE-1"', '[[allow]]\nid = "CVE-1"\nreason = " "\nuntil = 2026-06-01',
     '[[allow]]\nid = "CVE-1"\nreason = "x"\nuntil = "soon"', "allow = 3"],
)  # fmt: skip
def test_what_is_allowed_has_a_reason_and_an_end(text: str) -> None:
    with pytest.raises(audit.BrokenError):
        audit.allowed(text)


def test_the_allow_file_in_use_can_be_read() -> None:
    audit.allowed((ROOT / ".ci" / "audit.toml").read_text())


def test_the_audited_lock_holds_all_of_the_other() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text().splitlines()
        return {line.split(";")[0].strip() for line in lines if line[:1].isalpha()}

    assert pins("requirements.lock") <= pins("requirements-dev.lock")


def _component(name: str, version: str = "1.0") -> dict[str, Any]:
    return {"bom-ref": f"{name}=={version}", "name": name, "version": version, "type": "library"}


def test_the_bill_has_what_a_run_needs_and_no_more() -> None:
    names = ["Torch", "nvidia-nccl", "pytest", "pluggy", "uv", "PyYAML"]
    edges = {"Torch": ["nvidia-nccl", "PyYAML"], "pytest": ["pluggy", "PyYAML"], "PyYAML": ["pytest"]}
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": sbom.SPEC,
        "version": 1,
        "components": [_component(name) for name in names],
        "dependencies": [
            {"ref": "root-component", "dependsOn": ["Torch==1.0", "pytest==1.0"]},
            *(
                {"ref": f"{name}==1.0", "dependsOn": [f"{one}==1.0" for one in edges.get(name, [])]}
                for name in names
            ),
        ],
    }
    found = sbom.for_a_run(bill, {"torch", "pyyaml"}, {"torch", "pyyaml", "pytest", "pluggy"})
    assert [one["name"] for one in found["components"]] == ["Torch", "nvidia-nccl", "PyYAML"]
    assert found["dependencies"][0] == {"ref": "root-component", "dependsOn": ["Torch==1.0"]}
    assert {one["ref"] for one in found["dependencies"]} == {
        "root-component", "Torch==1.0", "nvidia-nccl==1.0", "PyYAML==1.0"
    }  # fmt: skip
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="the lock's cyclonedx-bom is not installed: make setup-dev"
    )
    from cyclonedx.schema import SchemaVersion

    problem = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(found))
    assert problem is None


def test_names_in_a_lock() -> None:
    names = sbom.names_in(ROOT / "requirements.lock")
    assert {"torch", "pyyaml", "ray"} <= names
    assert "pytest" not in names
    assert sbom.normalised("Foo_bar.Baz") == "foo-bar-baz"
