"""Drains one node of a Ray cluster, so that training leaves it before its machine ends."""

from __future__ import annotations

import math
import socket
from typing import Any

from orchestrator.elastic.cloud_metadata import Notice
from orchestrator.errors import UserError

# A drained node is drained again only for an end that comes earlier by more than this.
_EARLIER_S = 3.0
_PREEMPTION = 2  # DRAIN_NODE_REASON_PREEMPTION
RPC_TIMEOUT_S = 5.0


class NodeDrainer:
    """Drains one node of a cluster through the cluster's GCS. Connects when it is first used.

    Args:
        gcs_address: HOST:PORT of the cluster's head.
        node_id: hexadecimal; default: the one live node with an address of this machine.
    """

    def __init__(self, gcs_address: str, node_id: str | None = None) -> None:
        self._address = gcs_address
        self._node_id = node_id
        self._state: Any = None
        self._asked: str | None = None
        self._announced: dict[str, float] = {}

    def drain(self, notice: Notice) -> bool:
        """Announce the end of the node; False if an end at this time or sooner is announced already.

        Raises:
            UserError: no node of the cluster, or more than one, is on this machine.
            OSError: the head did not answer.
            RuntimeError: Ray refused.
        """
        import ray

        node_id = self._asked = self.node_id()
        known = self._deadline(node_id)
        if known is not None and notice.deadline > known - _EARLIER_S:
            return False
        client = ray._raylet.GcsClient(address=self._address)
        deadline_ms = int(notice.deadline * 1000)
        accepted, why = client.drain_node(
            node_id, _PREEMPTION, notice.source, deadline_ms, timeout=RPC_TIMEOUT_S
        )
        if not accepted:
            raise RuntimeError(f"Ray refused to drain node {node_id}: {why}")
        self._announced[node_id] = notice.deadline
        return True

    def is_alive(self) -> bool:
        """Whether the node that was drained last is still in the cluster."""
        return any(node["NodeID"] == self._asked and node["Alive"] for node in self._nodes())

    def node_id(self) -> str:
        """The node that is drained; one that was found is looked up anew, since `ray start` gives a new one."""
        if self._node_id is not None:
            return self._node_id
        mine = own_addresses()
        found = [n["NodeID"] for n in self._nodes() if n["Alive"] and n["NodeManagerAddress"] in mine]
        if len(found) != 1:
            raise UserError(
                f"{len(found)} nodes of the Ray cluster {self._address} are on this machine",
                hint="start Ray on it first"
                if not found
                else "choose one with --node-id (see `ray list nodes`)",
            )
        return str(found[0])

    def _deadline(self, node_id: str) -> float | None:
        """Seconds since 1970; infinity for a drain without a deadline; None if the node is not drained."""
        milliseconds: int | None = self._connect().get_draining_nodes().get(node_id)
        if milliseconds is None:
            return self._announced.get(node_id)
        return milliseconds / 1000 if milliseconds else math.inf

    def _nodes(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = self._connect().node_table()
        return nodes

    def _connect(self) -> Any:
        if self._state is None:
            import ray
            from ray._private.state import GlobalState

            # Ray's own client would try for 15 s, and print lines of C++.
            host, _, port = self._address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=RPC_TIMEOUT_S).close()
            state = GlobalState()
            state._initialize_global_state(
                ray._raylet.GcsClientOptions.create(
                    self._address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
                )
            )
            try:
                state._connect_and_get_accessor()
            except ray.exceptions.RaySystemError as error:
                raise RuntimeError(
                    f"a server listens at {self._address} but does not take this agent; if its cluster has a token, "
                    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or put the token into ~/.ray/auth_token"
                ) from error
            self._state = state
        return self._state


def own_addresses() -> set[str]:
    """IP addresses of this machine."""
    import psutil

    return {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
