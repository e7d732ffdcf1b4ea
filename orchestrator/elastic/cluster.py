"""The Ray cluster a pipeline runs on: its own by default, never one that merely happens to run."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.spec import Cluster

logger = logging.getLogger("orchestrator")

_PREFIX = "orchestrator-ray-"

# Read by Ray Train's controller and workers; a user's own setting wins. The defaults are made for jobs of
# days: here a lost worker is noticed in a second and a smaller group is formed without waiting a minute.
_TRAIN_DEFAULTS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def start(cluster: Cluster) -> Iterator[None]:
    """Connect to the pipeline's cluster, starting one where the address is `local`; leaves nothing behind.

    An own cluster lives in a temporary folder of its own, so neither a running cluster nor the remains of a
    killed one can be mistaken for it.
    """
    for name, value in _TRAIN_DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    if cluster.address != "local":
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # Nobody announces the end of the one machine it runs on.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    try:
        ray.init(
            address="local",
            num_cpus=_slots(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
        _quiet()
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _quiet() -> None:
    """The raylet's notices go to the log; Ray would print them between our lines even without `log_to_driver`."""
    from ray._private import worker

    def to_log(data: dict[str, Any], *_: Any, **__: Any) -> None:
        for line in data["lines"]:
            logger.debug("%s: %s", data["pid"], line)

    worker.print_to_stdstream = to_log


def _slots() -> int:
    """Logical CPUs: places for workers, not cores. A teacher and several students share a laptop's cores."""
    return max(8, os.cpu_count() or 1)


def _sweep() -> None:
    """Remove the folders of own clusters whose driver was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
