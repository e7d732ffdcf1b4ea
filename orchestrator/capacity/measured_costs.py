"""What a teacher and its students were measured to cost on this machine, kept so that it is measured once."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.config.settings import Strict
from orchestrator.fsio import atomic_write
from orchestrator.storage.cache_folder import cache_folder

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Profile(Strict):
    """Seconds of a part's step on one device; on CPUs processor seconds, with every core of the machine at work.

    Attributes:
        fixed_s: whatever the number of blocks.
        block_s: for each block.
        exchange_s: more with a second worker; 0 where that was not measured.
        measured_at: ISO 8601, UTC.
        hardware: see :func:`hardware`.
    """

    fixed_s: _Seconds
    block_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    exchange_s: _Seconds = 0.0
    measured_at: str
    hardware: dict[str, Any]

    def teacher(self, num_blocks: int) -> TeacherCost:
        """The cost of a teacher that steps through so many blocks."""
        return TeacherCost(self.fixed_s + num_blocks * self.block_s)

    def student(self, name: str, num_blocks: int, steps: int) -> StudentCost:
        """The cost of a student with so many blocks a step and steps to do."""
        return StudentCost(name, num_blocks, self.block_s, self.fixed_s, self.exchange_s, steps)


def fit(one_block_s: float, two_blocks_s: float) -> tuple[float, float]:
    """The fixed part and that of a block, from steps of one and of two blocks; neither is below 0."""
    block_s = two_blocks_s - one_block_s
    if not 0 < block_s <= one_block_s:
        # Noise, or a first block dearer than it can be: two blocks are what steps are made of.
        return 0.0, two_blocks_s / 2
    return one_block_s - block_s, block_s


def hardware(wanted: str = "auto") -> dict[str, Any]:
    """What decides how fast this machine is: device, processor, cores, threads and torch's version.

    Args:
        wanted: an `elastic.device`: `cpu` counts cores even where there are GPUs.
    """
    import torch

    from orchestrator.training.device import CPU, assigned_gpus

    gpus = () if wanted == CPU else assigned_gpus()
    gpu = bool(gpus)
    return {
        "device": torch.cuda.get_device_name(0) if gpu else "cpu",
        "devices": len(gpus) if gpu else cores(),
        "processor": _processor(),
        "cores": cores(),
        "threads": 0 if gpu else 1,
        "torch": version("torch"),
    }


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(machine: Mapping[str, Any], identity: Mapping[str, Any]) -> Profile | None:
    """What was measured on such a machine for a part of this identity; None if nothing was, or it cannot be read."""
    try:
        return Profile.model_validate_json(_path(machine, identity).read_text())
    except (OSError, ValidationError):
        return None


def save(profile: Profile, identity: Mapping[str, Any]) -> Path:
    """Keep a measurement; the file says in clear what it is of."""
    path = _path(profile.hardware, identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, profile.model_dump_json(indent=1))
    atomic_write(path.with_suffix(".of"), json.dumps(identity, indent=1, sort_keys=True))
    return path


def _path(machine: Mapping[str, Any], identity: Mapping[str, Any]) -> Path:
    text = json.dumps([dict(machine), dict(identity)], sort_keys=True)
    return cache_folder() / "profiles" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
