"""A look at the machine: what is installed, what it can compute with, what Ray needs, whether the store works."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from rich.console import Console
from rich.text import Text

from orchestrator import disk
from orchestrator.elastic.cluster_check import load, short_folder
from orchestrator.errors import UserError
from orchestrator.pipeline.check.probes import copy_trouble, store_trouble
from orchestrator.pipeline.keys.code_digest import versions
from orchestrator.storage.open import is_remote
from orchestrator.table import stage_table

_REQUIRED = ("dinov3-orchestrator", "torch", "ray", "deepspeed", "mlflow", "pydantic", "pyarrow", "numpy")
_GIB = 2**30
_LOW_DISK = 5 * _GIB
_LOW_SHARED_MEMORY = _GIB
_BUSY = 2.0

# Fine, in the way of a run, or neither; what it is about; what was found.
Row = tuple[bool | None, str, str]
_MARKS = {
    True: Text("✓", style="green"),
    None: Text("!", style="yellow"),
    False: Text("✗", style="red"),
}


def examine(console: Console, store: str) -> bool:
    """Print a table of checks; True if nothing stands in the way of a run."""
    found = versions(_REQUIRED)
    rows: list[Row] = [(True, "python", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    rows += [(name in found, name, found.get(name, "not installed")) for name in _REQUIRED]
    rows += [_device(), (True, "cpu cores", str(len(os.sched_getaffinity(0)))), _load(), _home(), _sockets()]
    rows += [_shared_memory(), _store(store)]
    table = stage_table("", "what", "found")
    for fine, what, detail in rows:
        table.add_row(_MARKS[fine], what, detail)
    console.print(table)
    healthy = all(fine is not False for fine, _, _ in rows)
    if not healthy:
        console.print(Text("Fix the checks marked ✗ first.", style="red"))
    return healthy


def _device() -> Row:
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


def _load() -> Row:
    cores = len(os.sched_getaffinity(0))
    if os.getloadavg()[0] <= _BUSY * cores:
        return True, "load", load()
    return None, "load", f"{load()}: Ray may take minutes to start, and steps take longer"


def _home() -> Row:
    """Ray and caches want to write below it; a run does without, as its cluster has a token of its own."""
    try:
        home = Path.home()
    except RuntimeError:
        return None, "home", "HOME is not set, and this user has no home folder: caches are not kept"
    if home.is_dir() and os.access(home, os.W_OK | os.X_OK):
        return True, "home", f"{home} can be written"
    return None, "home", f"{home} cannot be written: caches are not kept, and Ray runs without them"


def _sockets() -> Row:
    """Whether there is a folder with a path short enough for Ray's sockets."""
    try:
        folder = short_folder()
    except UserError as error:
        return False, "tmpdir", f"{error.what}: {error.hint}"
    folder.rmdir()
    named = os.environ.get("TMPDIR")
    if named and folder.parent != Path(named).absolute():
        return None, "tmpdir", f"{named} cannot be used for Ray's sockets: {folder.parent} is used for them"
    return True, "tmpdir", f"{folder.parent} can be written and is short enough for Ray's sockets"


def _shared_memory() -> Row:
    """Containers often have 64 MiB; Ray then keeps its objects on the disk, which is slow."""
    try:
        size = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return (
            None,
            "/dev/shm",
            f"cannot be used ({error.strerror}): Ray stores its objects on disk, which is slow",
        )
    found = f"{size.free / _GIB:.1f} of {size.total / _GIB:.1f} GiB free"
    if size.free >= _LOW_SHARED_MEMORY:
        return True, "/dev/shm", found
    return None, "/dev/shm", f"{found}: give the container more (docker run --shm-size=8g)"


def _store(uri: str) -> Row:
    """Whether the store, or the nearest folder above it that exists, can be written and has room."""
    if is_remote(uri):
        if (error := store_trouble(uri, writes=True)) is not None:
            return False, "store", error.what
        if (why := copy_trouble(uri)) is not None:
            found = f"{uri} can be written, listed and read, but copies no objects"
            return None, "store", f"{found}, so finished files pass through the driver: {why}"
        return True, "store", f"{uri} can be written, copied, listed and read"
    try:
        folder = disk.named(uri.removeprefix("file://")).absolute()
    except UserError as error:
        return False, "store", f"{uri}: {error.what}"
    existing = disk.existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return False, "store", f"{folder} cannot be written"
    free = disk.space(existing)[0]
    return free >= _LOW_DISK, "store", f"{folder} can be written, {free / _GIB:.0f} GiB free"
