"""The controller host of the cluster that this driver is connected to: started with the cluster, replaced if it dies.

It imports neither Ray Train nor torch, so whoever only starts a cluster does not wait for them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ClusterLostError

if TYPE_CHECKING:
    from orchestrator.elastic.resources import SlotShape

logger = logging.getLogger("orchestrator")

# What the controller reads from its environment; a user's own setting wins.
_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A drain is a resize (`scaling_policy.py`); Ray Train's own watcher would end the run as if it were done.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
_RECONCILES = "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION"


class ControllerHosts:
    """The controller host of the cluster that this driver is connected to.

    Attributes:
        cluster: counts the clusters that this driver was connected to. A thread that still works for a lost one
            must not go on with the one that was started in its place.
    """

    def __init__(self) -> None:
        self.cluster = 0
        self._host: Any = None
        self._arguments: tuple[tuple[str, ...], float] = ((), 15.0)
        self._reconciles = True
        self._lock = threading.Lock()

    def begin(
        self, preload: Sequence[str] = (), heartbeat_timeout_s: float = 15.0, *, reconciles: bool = True
    ) -> None:
        """Start a host for the cluster that this driver has just connected to.

        Args:
            preload: modules that workers will need.
            heartbeat_timeout_s: of slots.
            reconciles: whether Ray Train looks for runs whose controller has gone; it asks the dashboard for that.
        """
        with self._lock:
            self.cluster += 1
            self._reconciles = reconciles
            self._arguments = (tuple(preload), heartbeat_timeout_s)
            self._host = self._start()

    def prestart(self, number: int, shape: SlotShape) -> None:
        """Start slots before the first run asks for them."""
        if number:
            self.current().prestart.remote(number, shape)

    def current(self, cluster: int | None = None) -> Any:
        """The host's actor; started at first use.

        Raises:
            ClusterLostError: the driver is not connected to `cluster` any more.
        """
        with self._lock:
            self._check(cluster)
            if self._host is None:
                self._host = self._start()
            return self._host

    def slots(self, timeout: float = 10.0) -> list[dict[str, Any]]:
        """What is known of each slot of this driver's pool."""
        import ray

        return list(ray.get(self.current().slots.remote(), timeout=timeout))

    def replace(self, lost: Any, cluster: int) -> None:
        """This host is gone: start another, unless another run has done so.

        Raises:
            ClusterLostError: see `current`.
        """
        import ray

        with self._lock:
            self._check(cluster)
            if self._host is lost:
                ray.kill(lost)
                self._host = self._start()

    def end(self) -> None:
        """End the host and its slots; to be called before the driver disconnects."""
        import ray

        with self._lock:
            host, self._host = self._host, None
        if host is None:
            return
        try:
            ray.get(host.close.remote(), timeout=5.0)
        except ray.exceptions.RayError as error:
            logger.debug("the controller host did not end itself: %s", error)
        ray.kill(host)

    def _check(self, cluster: int | None) -> None:
        import ray

        if cluster not in (None, self.cluster) or not ray.is_initialized():
            raise ClusterLostError("the cluster of this run no longer exists", own=True)

    def _start(self) -> Any:
        import ray

        from orchestrator.elastic.controller import ControllerHost

        settings = {**_ENVIRONMENT, _RECONCILES: "1" if self._reconciles else "0"}
        environment = {name: os.environ.get(name, value) for name, value in settings.items()}
        remote = ray.remote(ControllerHost).options(
            num_cpus=0,
            max_concurrency=1000,
            max_restarts=0,
            runtime_env={"env_vars": environment},
            # With the driver: it ends with it, and writes to the same folder.
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
        )
        return remote.remote(*self._arguments)


hosts = ControllerHosts()
