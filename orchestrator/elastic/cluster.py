"""The Ray cluster a pipeline runs on: its own by default, never one that merely happens to run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.elastic import fleet
from orchestrator.elastic.preemption_agent import watch_for_preemption
from orchestrator.spec import Cluster

logger = logging.getLogger("orchestrator")

_PREFIX = "orchestrator-ray-"

# A user's own setting wins.
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray lets its workers yield to everything else on a machine; here they are what the machine is for.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
}


@contextmanager
def start(cluster: Cluster, preload: Sequence[str] = (), prewarm: int = 0) -> Iterator[None]:
    """Connect to the pipeline's cluster, starting one where the address is `local`; leaves nothing behind.

    An own cluster lives in a temporary folder of its own, so neither a running cluster nor the remains of a
    killed one can be mistaken for it.

    Args:
        cluster: which one.
        preload: modules that workers will need, imported before they do.
        prewarm: seats of an own cluster to make at once, so that they are warm when the first job comes.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    import ray

    if cluster.address != "local":
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            fleet.begin(preload)
            with watch_for_preemption(cluster.preemption_notices):
                yield
        finally:
            fleet.end()
            ray.shutdown()
        return
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    reaper = subprocess.Popen(
        [sys.executable, "-S", str(Path(__file__).with_name("reaper.py")), str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert reaper.stdin is not None
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
        fleet.begin(preload).prewarm(prewarm, fleet.shape("auto", 1.0))
        with watch_for_preemption(cluster.preemption_notices):
            yield
    finally:
        fleet.end()
        ray.shutdown()
        reaper.stdin.close()
        reaper.wait()


def _quiet() -> None:
    """The raylet's notices go to the log; Ray would print them between our lines even without `log_to_driver`."""
    from ray._private import worker

    def to_log(data: dict[str, Any], *_: Any, **__: Any) -> None:
        for line in data["lines"]:
            logger.debug("%s: %s", data["pid"], line)

    worker.print_to_stdstream = to_log


def most_object_store() -> int:
    """Bytes that the object store of an own cluster has at most: Ray takes 30 % of the memory, or less."""
    return int(0.3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _slots() -> int:
    """Logical CPUs: places for workers, not cores. A teacher and several students share a laptop's cores."""
    return max(8, os.cpu_count() or 1)
