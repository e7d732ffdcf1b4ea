"""The command `orchestrator` as the user called it, for hints that can be copied."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_NAME = "orchestrator"


def command(*arguments: str) -> str:
    """A line for the shell: the command in the form that found it this time, and arguments.

    `orchestrator` if the shell finds this program by its name, its path if it does not, and `PYTHON -m orchestrator`
    where Python was called. Any other program that uses the package gets the bare name.
    """
    return shlex.join([*_called(sys.argv[0], sys.executable), *arguments])


def neighbour(name: str) -> str:
    """A program of the same environment, as a user has to write it here."""
    path = Path(sys.executable).with_name(name)
    return _short(str(path)) if path.is_file() else name


def _called(program: str, python: str) -> Sequence[str]:
    path = Path(program)
    if path.name == "__main__.py" and path.parent.name == _NAME:
        return [_short(python), "-m", _NAME]
    if path.name != _NAME or os.sep not in program:
        return [_NAME]
    found = shutil.which(_NAME)
    if found is not None and Path(found).resolve() == path.resolve():
        return [_NAME]
    return [_short(program)]


def _short(program: str) -> str:
    """A path below the current directory without it; a name that the shell finds alone."""
    path = Path(program)
    if shutil.which(path.name) == program:
        return path.name
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else program
