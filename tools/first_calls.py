"""Which files of the package a command needs, in the order in which it first calls a function of each.

    python -m tools.first_calls --files orchestrator run pipeline.yaml

runs the command and notes, in all of its Python processes, the first call of a function in each file, with its time.
It prints how many files these are, of how many, in how many folders, and how often the next file lies in another
folder than the one before: how far a reader has to go who follows one run (docs/adr/0008-layout-and-words.md).
`__init__.py` files do not count. The bodies of modules and classes are no functions, but functions that are called
while a module is imported are. Everything is slower meanwhile, by several times.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("orchestrator", "models", "objectives", "stages")
# Where the processes of the command write, a file each.
_FOLDER = "FIRST_CALLS_FOLDER"


def package_files() -> list[Path]:
    """The package's Python files, relative to the root; the folders that are links in it are listed once."""
    found = {
        path.resolve().relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    return sorted(found)


def record() -> None:
    """Note the first call of a function in each file from now on, in this process and those that it forks."""
    folder = os.environ.get(_FOLDER)
    if folder is None:
        return
    # By the name that a code object has, which may lead through a link: whether a first call is still to come.
    is_open: dict[str, bool] = {}
    prefix = f"{ROOT}{os.sep}"

    def on_event(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not is_open.get(code.co_filename, True):
            return
        if not code.co_filename.startswith(prefix):
            is_open[code.co_filename] = False
        elif code.co_flags & inspect.CO_OPTIMIZED:
            is_open[code.co_filename] = False
            line = f"{time.time_ns()} {os.path.realpath(code.co_filename)}\n"
            with open(f"{folder}/{os.getpid()}", "a") as file:  # noqa: PTH123, pathlib may be what is imported
                file.write(line)

    sys.setprofile(on_event)
    threading.setprofile(on_event)


def first_calls(folder: Path) -> Iterator[Path]:
    """Files relative to the root, in the order of their first calls over all processes; the package's only."""
    known = {ROOT / file for file in package_files()}
    lines = [line.split(" ", 1) for file in folder.iterdir() for line in file.read_text().splitlines()]
    seen: set[Path] = set()
    for _, name in sorted(lines, key=lambda line: int(line[0])):
        path = Path(name)
        if path in known and path not in seen:
            seen.add(path)
            yield path.relative_to(ROOT)


def changes(files: list[Path]) -> int:
    """How often a file lies in another folder than the one before it."""
    return sum(one.parent != other.parent for one, other in pairwise(files))


def trace(command: list[str]) -> tuple[int, list[Path]]:
    """Exit code of the command, and the files that it needs, in order."""
    with tempfile.TemporaryDirectory() as site, tempfile.TemporaryDirectory() as notes:
        # Python imports this module at its start, wherever it finds it.
        (Path(site) / "sitecustomize.py").write_text("from tools.first_calls import record\n\nrecord()\n")
        path = os.pathsep.join((site, str(ROOT), os.environ.get("PYTHONPATH", "")))
        env = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), _FOLDER: notes}
        done = subprocess.run(command, env=env, check=False)
        return done.returncode, list(first_calls(Path(notes)))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.first_calls", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--files", action="store_true", help="Print the files, too, in order.")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="The command to run.")
    arguments = parser.parse_args()
    code, files = trace(arguments.command)
    if arguments.files:
        sys.stdout.writelines(f"{file}\n" for file in files)
    folders = len({file.parent for file in files})
    sys.stdout.write(
        f"{len(files)} of {len(package_files())} files, {folders} folders, {changes(files)} changes of folder\n"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
