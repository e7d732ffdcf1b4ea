"""Files are counted by the first call of a function in each, over all processes, in order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.first_calls import changes, package_files, trace

CODE = """
import subprocess, sys, threading
from orchestrator.errors import shortened
from orchestrator.storage.bytes_store import checked_name

worker = threading.Thread(target=checked_name, args=("a",))
worker.start()
worker.join()
subprocess.run([sys.executable, "-c", "from orchestrator.names import parts_of; parts_of('a')"], check=True)
shortened("text")
"""


@pytest.mark.heavy
def test_threads_and_processes_count_in_the_order_of_their_first_calls() -> None:
    code, files = trace([sys.executable, "-c", CODE])
    assert code == 0
    names = [str(file) for file in files]
    assert len(set(names)) == len(names)
    assert "orchestrator/names.py" in names, "of a thread, and of a process"
    assert names[-1] == "orchestrator/errors.py", "the last first call"
    assert not any(name.endswith("__init__.py") for name in names)


@pytest.mark.heavy
def test_what_a_command_ends_with_is_told() -> None:
    assert trace([sys.executable, "-c", "raise SystemExit(3)"]) == (3, [])


def test_changes_are_between_neighbours() -> None:
    assert changes([Path("a/1"), Path("a/2"), Path("b/1"), Path("a/3")]) == 2
    assert changes([]) == 0


def test_files_that_are_links_are_listed_once() -> None:
    files = package_files()
    assert len(set(files)) == len(files)
    assert Path("stages/base.py") in files
    assert not any(str(file).startswith("orchestrator/stages/") for file in files)
