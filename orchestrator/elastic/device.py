"""Which devices this process may use: those that its slot was given, whatever else the machine has.

A slot tells its worker process by `ORCHESTRATOR_GPUS`. Ray tells its actors and tasks. A process that neither
started, such as the driver or a script, may use what `CUDA_VISIBLE_DEVICES` leaves it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

# Ids of GPUs with commas between them; empty for a worker on a CPU.
VARIABLE = "ORCHESTRATOR_GPUS"
CPU = "cpu"
_CUDA_VARIABLE = "CUDA_VISIBLE_DEVICES"


def assigned_gpus() -> tuple[str, ...]:
    """Ids of the GPUs that this process may use, as its node counts them; empty: it computes on CPUs."""
    if VARIABLE in os.environ:
        return _split(os.environ[VARIABLE])
    given = _given_by_ray()
    return visible_gpus() if given is None else given


def device(wanted: str = "auto") -> str:
    """What this process computes on, in torch's words: `cuda:0` or `cpu`.

    Args:
        wanted: an `elastic.device`; `cpu` uses no GPU even if the process was given one.
    """
    # Whoever starts a process on GPUs shows it no others, so its first is number 0.
    return "cuda:0" if wanted != CPU and assigned_gpus() else CPU


def device_type(wanted: str = "auto") -> str:
    """As :func:`device`, without a number: `cuda` or `cpu`."""
    return device(wanted).partition(":")[0]


def environment(gpus: Sequence[str]) -> Mapping[str, str]:
    """Environment variables of a process that may use these GPUs and no others; none: it computes on CPUs."""
    ids = ",".join(gpus)
    shared = {VARIABLE: ids, _CUDA_VARIABLE: ids, "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        # A fork server must not touch a device, and asking CUDA itself how many there are would.
        return {**shared, "DS_ACCELERATOR": "cuda", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    # One thread a worker: more workers, not more threads, is how a step gets faster, and results do not
    # depend on how many cores the machine has.
    return {**shared, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def visible_gpus() -> tuple[str, ...]:
    """Ids of the GPUs that torch can see in a process that no slot was given to. CUDA is not initialised by it."""
    listed = os.environ.get(_CUDA_VARIABLE)
    if listed is not None and not _split(listed):
        return ()
    import torch

    count = torch.cuda.device_count()
    ids = _split(listed) if listed is not None else tuple(str(number) for number in range(count))
    return ids[:count]


def assert_forkable() -> None:
    """See that this process can be forked: what CUDA has initialised does not survive a fork.

    Raises:
        RuntimeError: CUDA is initialised here.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            f"process {os.getpid()} has initialised CUDA and must not be forked: a module that is imported before "
            "the fork uses a GPU at import"
        )


def _given_by_ray() -> tuple[str, ...] | None:
    """Ids of the GPUs of the actor or task that this process is; None if it is neither."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return None
    return tuple(sorted(str(number) for number in context.get_accelerator_ids().get("GPU", ())))


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
