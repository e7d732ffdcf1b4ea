"""The folder of this machine for what can be fetched again: packages, copies of a remote store's objects."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ORCHESTRATOR_CACHE`, by default `~/.cache/dinov3-orchestrator`. It need not exist."""
    chosen = os.environ.get("ORCHESTRATOR_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "dinov3-orchestrator"
    return folder.absolute()
