"""Hints name the command as it was called."""

import sys
from pathlib import Path

import pytest

from orchestrator.shell_command import command


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An executable `.venv/bin/orchestrator` below the current directory, which is not on PATH."""
    path = tmp_path / ".venv" / "bin" / "orchestrator"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return path


def test_a_command_that_was_called_by_path_is_named_by_path(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for called in (".venv/bin/orchestrator", str(program)):
        monkeypatch.setattr(sys, "argv", [called, "run"])
        assert command("run", "a b.yaml") == ".venv/bin/orchestrator run 'a b.yaml'"


def test_a_command_on_the_path_is_named_by_name(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(sys, "argv", [str(program), "run"])
    assert command("run", "a.yaml") == "orchestrator run a.yaml"


def test_python_m_is_named_as_such(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = program.with_name("python")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["/somewhere/orchestrator/__main__.py", "run"])
    assert command("status", "a.yaml") == ".venv/bin/python -m orchestrator status a.yaml"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(python.parent))
    assert command("status", "a.yaml") == "python -m orchestrator status a.yaml"


def test_other_programs_get_the_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
    assert command("gc", "a.yaml") == "orchestrator gc a.yaml"
