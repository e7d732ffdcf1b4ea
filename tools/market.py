"""A spot market on one machine: a real Ray cluster of several raylets whose machines can be given and taken away.

For tests, benchmarks and replays of traces. Everything lives in a temporary folder of its own, and ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.elastic.nodes import minimal_agents
from orchestrator.elastic.reaper import Reaper

# A GCS that pings often: what it believes about a killed node matters only for where new slots go.
_ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


class SpotMarket:
    """A head without places for workers, and machines of `slots` places each. Use it as a context manager.

    Machines are added in the thread that made the market; they may be killed from any.

    Attributes:
        address: for `ray.init` or a pipeline's `cluster.address`.
        machines: those that are up, by the name they were given.
        leaving: names of those whose end was announced: Ray gives them no work, and ends them at their deadline.
    """

    def __init__(self, slots: int = 1, head_slots: int = 0) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from ray._common.utils import get_default_ray_temp_dir
        from ray.cluster_utils import Cluster

        self._slots = slots
        self._folder = Path(tempfile.mkdtemp(prefix="orchestrator-market-"))
        # Ray's test cluster writes its address below the default folder, and does not make it.
        Path(get_default_ray_temp_dir()).mkdir(parents=True, exist_ok=True)
        # Object stores are small: what passes through them here is, and /dev/shm may be.
        self._sizes = {"object_store_memory": 256 * 2**20, "include_dashboard": False}
        # Ends all of it if this process is killed.
        self._reaper = Reaper(self._folder)
        head = {"num_cpus": head_slots, "_system_config": {}, "temp_dir": str(self._folder), **self._sizes}
        with self._reaper.marking(), minimal_agents():
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.machines: dict[str, Any] = {}
        self.leaving: set[str] = set()

    def add(self, name: str, slots: int | None = None, **has: Any) -> str:
        """A new machine; returns its node id. `has`: what Ray believes of it, such as `num_gpus` and `labels`."""
        with self._reaper.marking(), minimal_agents():
            node = self._cluster.add_node(
                wait=True, num_cpus=self._slots if slots is None else slots, **self._sizes, **has
            )
        self.machines[name] = node
        return str(node.node_id)

    def kill(self, name: str) -> float:
        """SIGKILL the machine: its raylet, and all that runs below it; returns when, in seconds since 1970."""
        import psutil

        node = self.machines.pop(name)
        self.leaving.discard(name)
        (raylet,) = node.all_processes["raylet"]
        processes = [psutil.Process(raylet.process.pid)]
        processes += processes[0].children(recursive=True)
        killed = time.time()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        return killed

    def drain(self, name: str, notice_s: float) -> None:
        """Announce that the machine goes in `notice_s` seconds, as a cloud does; it is not killed by that."""
        command = [
            str(Path(sys.executable).with_name("ray")),
            "drain-node",
            f"--address={self.address}",
            f"--node-id={self.machines[name].node_id}",
            "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=spot",
            f"--deadline-remaining-seconds={max(1, round(notice_s))}",
        ]
        self.leaving.add(name)
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def workers(self, name: str | None = None) -> list[Any]:
        """The training processes (psutil) on a machine, or on all."""
        import psutil

        found = []
        for machine in [name] if name is not None else list(self.machines):
            (raylet,) = self.machines[machine].all_processes["raylet"]
            for process in psutil.Process(raylet.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    # A worker is forked from a fork server and has its command line.
                    if all(
                        "orchestrator.elastic.forkserver" in " ".join(p.cmdline())
                        for p in (process, process.parent())
                    ):
                        found.append(process)
        return found

    def close(self) -> None:
        """End all that is left."""
        for node in self._cluster.list_all_nodes():
            for infos in node.all_processes.values():
                for info in infos:
                    with suppress(ProcessLookupError):
                        os.kill(info.process.pid, signal.SIGCONT)
        self._cluster.shutdown()
        self._reaper.close()

    def __enter__(self) -> SpotMarket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
