"""A look at the machine: what is installed, what it can compute with, whether the store works."""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from pathlib import Path

from rich.console import Console
from rich.text import Text

from orchestrator.errors import UserError
from orchestrator.pipeline.attempt import versions
from orchestrator.pipeline.reporter import stage_table
from orchestrator.store.open import is_remote, open_store
from orchestrator.store.s3 import S3Store

_REQUIRED = ("dinov3-orchestrator", "torch", "ray", "deepspeed", "mlflow", "pydantic", "pyarrow", "numpy")
_GIB = 2**30
_LOW_DISK = 5 * _GIB


def examine(console: Console, store: str) -> bool:
    """Print a table of checks; True if nothing stands in the way of a run."""
    found = versions(_REQUIRED)
    rows: list[tuple[bool, str, str]] = [
        (True, "python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    ]
    rows += [(name in found, name, found.get(name, "not installed")) for name in _REQUIRED]
    rows += [_device(), (True, "cpu cores", str(len(os.sched_getaffinity(0)))), _store(store)]
    table = stage_table("", "what", "found")
    for fine, what, detail in rows:
        table.add_row(Text("✓", style="green") if fine else Text("✗", style="red"), what, detail)
    console.print(table)
    healthy = all(fine for fine, _, _ in rows)
    if not healthy:
        console.print(Text("Mend what is marked ✗ first.", style="red"))
    return healthy


def _device() -> tuple[bool, str, str]:
    try:
        import torch
    except ImportError as error:
        return False, "device", f"torch cannot be imported: {error}"
    if torch.cuda.device_count():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return (
            True,
            "device",
            ", ".join(f"{item.name} ({item.total_memory / _GIB:.0f} GiB)" for item in names),
        )
    return True, "device", "CPU only: fine for the laptop pipeline"


def _store(uri: str) -> tuple[bool, str, str]:
    """Whether the store, or the nearest folder above it that exists, can be written and has room."""
    if is_remote(uri):
        return _remote_store(uri)
    folder = Path(uri.removeprefix("file://")).expanduser().absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return False, "store", f"{folder} cannot be written"
    free = shutil.disk_usage(existing).free
    return free >= _LOW_DISK, "store", f"{folder} can be written, {free / _GIB:.0f} GiB free"


def _remote_store(uri: str) -> tuple[bool, str, str]:
    """Whether an object can be put, listed, got and deleted."""
    name = f"doctor/{uuid.uuid4().hex}"
    try:
        store = open_store(uri)
        if isinstance(store, S3Store):
            store.check()
        store.put_bytes(name, b"well")
        well = store.get_bytes(name) == b"well" and name in store.list("doctor/")
        store.delete(name)
    except (UserError, OSError) as error:
        return False, "store", f"{uri}: {error.what if isinstance(error, UserError) else error}"
    return well, "store", f"{uri} can be written, listed and read"
