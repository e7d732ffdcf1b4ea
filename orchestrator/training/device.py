"""Which devices this process may use: those that its slot was given, and no others that the machine has.

A slot sets `ORCHESTRATOR_GPUS` for its worker process. For its actors and tasks, Ray knows the ids. A process that is
neither, such as the driver or a script, may use the GPUs in `CUDA_VISIBLE_DEVICES`, or all if that is not set.
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
    # CUDA_VISIBLE_DEVICES holds the assigned GPUs only, so the first of them is number 0 in this process.
    return "cuda:0" if wanted != CPU and assigned_gpus() else CPU


def device_type(wanted: str = "auto") -> str:
    """As :func:`device`, without a number: `cuda` or `cpu`."""
    return device(wanted).partition(":")[0]


def environment(gpus: Sequence[str]) -> Mapping[str, str]:
    """Environment variables of a process that may use these GPUs and no others; none: it computes on CPUs."""
    ids = ",".join(gpus)
    shared = {VARIABLE: ids, _CUDA_VARIABLE: ids, "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        # A fork server must not initialise CUDA. Counting devices by CUDA would; counting them by NVML does not.
        return {**shared, "DS_ACCELERATOR": "cuda", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    # One thread a worker: a step gets faster by more workers, not by more threads, and the results do not
    # depend on the number of cores.
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
    """Check that this process can be forked: CUDA does not work in a fork of a process that has initialised it.

    Raises:
        RuntimeError: CUDA is initialised here.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            f"process {os.getpid()} has initialised CUDA and must not be forked: a module that is imported before "
            "the fork uses a GPU at import"
        )


def use_deterministic_kernels() -> None:
    """Have CUDA compute the same bits each time; to be called before this process computes anything.

    By default some kernels add up in the order in which their threads finish, the backward pass of attention among
    them. Where an operation has no deterministic kernel, torch warns and uses the other. On CPUs nothing changes.
    """
    import torch

    # cuBLAS chooses among its workspaces by timing, unless they are of one size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A check for bugs, at the price of writing all memory once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
