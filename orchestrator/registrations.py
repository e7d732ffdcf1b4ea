"""What a program has registered beside entry points: names that stand for import paths, in an environment variable.

Imports nothing of the project, so that models, which stand alone, read it as everybody else does.
"""

from __future__ import annotations

import os
import re

PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""An import path: `package.module:Name`."""

REGISTERED = "ORCHESTRATOR_REGISTERED"
"""The environment variable with what was registered: `group/name=package.module:Name`, with spaces between."""


def is_path(name: str) -> bool:
    """Whether `name` is an import path, and not the name of an entry point."""
    return re.fullmatch(PATH, name) is not None


def registered(group: str) -> tuple[tuple[str, str], ...]:
    """Names of a group, such as `models`, with the import paths that they stand for; what is not a path is left out."""
    found = []
    for item in os.environ.get(REGISTERED, "").split():
        key, _, path = item.partition("=")
        of, _, name = key.partition("/")
        if of == group and is_path(path):
            found.append((name, path))
    return tuple(found)
