"""Which values of a pipeline file may be secrets, and how a message shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestrator.redact import redacted

# A worker's environment, which may hold tokens and passwords, also under a name that is not quite right.
_PRIVATE = re.compile(r"runtime_?env|env(?:ironment)?[_\-]?var|environment", re.IGNORECASE)
_PRIVATE_KEYS = ("env", "envs")
# What no name of a key has.
NO_NAME = re.compile(r"[^\w.\-]")


def is_private(path: Sequence[str | int]) -> bool:
    """Whether what is at or below `path` may be a secret, such as an environment variable: no message shows it."""
    return any(isinstance(part, str) and (part in _PRIVATE_KEYS or is_private_text(part)) for part in path)


def is_private_text(text: str) -> bool:
    """Whether a text speaks of an environment, so that any value in it may be a secret."""
    return _PRIVATE.search(text) is not None


def without_secrets(override: str) -> str:
    """An override as a message or a command may show it."""
    name, equals, value = override.partition("=")
    if not is_private_text(override):
        return f"{redacted(name)}{equals}{redacted(value)}"
    # Without `=`, or with it in the value, the name is what stands before anything that no name has.
    end = NO_NAME.search(name)
    return f"{name[: end.start()]} …" if end else f"{name}{equals}…"
