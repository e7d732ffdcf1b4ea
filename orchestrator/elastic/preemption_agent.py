"""Turns the announced end of a machine into the drain of its Ray node, with the machine's deadline.

Three ways to run it:

- :class:`PreemptionAgents`, in a pipeline's driver, keeps one actor without resources on each node that works.
- `python -m orchestrator.elastic.preemption_agent --address HEAD:6379` is the same agent as a service of the
  machine (a sidecar container, a systemd unit). SIGTERM is a notice, too: the machine ends after `--grace-s`.
- `… --now --grace-s 25` drains at once and waits until the node is empty, for a `preStop` hook.

By hand, the same is `ray drain-node --address HEAD:6379 --node-id ID --reason DRAIN_NODE_REASON_PREEMPTION
--reason-message WHY --deadline-remaining-seconds N`.

A drain means: Ray places nothing more on the node, the training leaves it between two steps, and Ray ends the node
at its deadline, or as soon as it is empty. A hint (see `cloud_metadata`) is logged and drains nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, get_args

from orchestrator.config.schema import PreemptionNotices
from orchestrator.elastic.cloud_metadata import (
    Cloud,
    Hint,
    MetadataClient,
    MetadataError,
    Notice,
    detect_cloud,
    metadata_client,
)
from orchestrator.elastic.node_drainer import RPC_TIMEOUT_S, NodeDrainer, own_addresses
from orchestrator.errors import UserError

logger = logging.getLogger("orchestrator")

# A notice that comes earlier waits until then: a drained node trains nothing, and is paid for.
_LONGEST_DRAIN_S = 300.0
_SLOWEST_POLL_S = 15.0
_ROUND_S = 2.0
_LONG_POLL_S = 30.0
# An agent keeps Ray's autoscaler from seeing its node as idle, so it goes when nothing else is there.
_IDLE_S = 20.0
_RESTART_S = 10.0


class NoticeWatcher:
    """Polls one metadata service and drains one node; survives a service or a cluster that does not answer.

    Args:
        client: the service.
        drainer: the node.
        report: is given one line for people for each change: a drain, a hint, an outage and its end.
    """

    def __init__(
        self, client: MetadataClient, drainer: NodeDrainer, report: Callable[[str], None] = logger.info
    ) -> None:
        self._client = client
        self._drainer = drainer
        self._report = report
        self._reported: set[str] = set()
        self._failures = 0

    def run(self, stop: threading.Event) -> None:
        """Poll until `stop` is set."""
        while not stop.wait(self.pause_s()):
            self.step()

    def pause_s(self) -> float:
        """Seconds until the next poll: longer while the service does not answer, but shorter than any notice."""
        slower = self._client.poll_s * (1 << min(self._failures, 3))
        return max(self._client.poll_s, min(slower, _SLOWEST_POLL_S))

    def step(self) -> None:
        """One poll, and what follows from it."""
        try:
            found = self._client.poll()
        except MetadataError as error:
            self._failures += 1
            if self._failures == 3:
                what = f"the metadata service of {self._client.cloud} does not answer"
                self._report(f"{what}: {error}; retrying")
            return
        if self._failures >= 3:
            self._report(f"the metadata service of {self._client.cloud} answers again")
        self._failures = 0
        for item in found:
            if isinstance(item, Hint):
                self._once(
                    item.source,
                    "it may be preempted or paused; training continues until the preemption is certain",
                )
            elif item.deadline - time.time() > _LONGEST_DRAIN_S:
                self._once(
                    item.source, f"it ends in {item.deadline - time.time():.0f} s; too early to drain it"
                )
            else:
                self._drain(item)

    def _drain(self, notice: Notice) -> None:
        try:
            if self._drainer.drain(notice):
                left = notice.deadline - time.time()
                self._report(f"{notice.source}: drained {left:.0f} s before its end")
        except Exception as error:  # the cluster may be in any state, and the next poll may find it better
            self._once(f"{notice.source}, not drained", str(error))

    def _once(self, what: str, line: str) -> None:
        if what not in self._reported:
            self._reported.add(what)
            self._report(f"{what}: {line}")


class PreemptionAgent:
    """The actor of one node: watches in a thread, and says what it saw to the driver that made it.

    Args:
        notices: the setting; `auto` looks which cloud this node is on.
    """

    def __init__(self, notices: PreemptionNotices) -> None:
        import ray

        self._lines: list[str] = []
        self._news = threading.Condition()
        self._cloud = watched_cloud(notices)
        if self._cloud is None:
            return
        context = ray.get_runtime_context()
        drainer = NodeDrainer(context.gcs_address, context.get_node_id())
        watcher = NoticeWatcher(metadata_client(self._cloud), drainer, self._report)
        threading.Thread(target=watcher.run, args=(threading.Event(),), daemon=True).start()

    def lines(self, seen: int, wait_s: float) -> tuple[Cloud | None, list[str]]:
        """The cloud that is watched, and what was reported after the first `seen` lines; waits for news."""
        with self._news:
            if self._cloud is not None:
                self._news.wait_for(lambda: len(self._lines) > seen, timeout=wait_s)
            return self._cloud, self._lines[seen:]

    def _report(self, line: str) -> None:
        with self._news:
            self._lines.append(line)
            self._news.notify_all()


@dataclass
class _Agent:
    actor: Any
    answer: Any = None
    seen: int = 0
    busy_at: float = field(default_factory=time.monotonic)


class PreemptionAgents:
    """The agents of a driver's cluster: one on each node on which something runs, also on nodes that join later.

    An idle node has none, because an actor of any kind keeps Ray's autoscaler from giving the machine back. A node
    of no known cloud is asked once. Use :func:`watch_for_preemption`, or `start` and `close`; `poll` is one round.

    Attributes:
        clouds: by node id, what is watched on it; None where it is not a machine of a known cloud.
    """

    def __init__(self, notices: PreemptionNotices) -> None:
        self._notices = notices
        self._agents: dict[str, _Agent] = {}
        self._failed: dict[str, tuple[float, str]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.clouds: dict[str, Cloud | None] = {}

    def start(self) -> None:
        """Poll from a thread of its own until `close`. Does nothing where no node can have a metadata service."""
        if self._notices in ("off", "kubernetes"):
            return
        self._thread = threading.Thread(target=self._run, name="preemption agents", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Start agents on nodes that have begun to work, take in what agents say, end those that are not needed."""
        busy, alive = self._nodes()
        now = time.monotonic()
        for node_id in busy:
            agent = self._agents.get(node_id)
            if agent is not None:
                agent.busy_at = now
            elif self.clouds.get(node_id, "unknown") is not None:
                since, why = self._failed.get(node_id, (-math.inf, ""))
                if now - since < _RESTART_S:
                    continue
                if why:
                    logger.info("node %s: its preemption agent failed and is restarted: %s", node_id[:8], why)
                self._agents[node_id] = _Agent(self._make(node_id))
        for node_id, agent in list(self._agents.items()):
            if node_id not in alive or now - agent.busy_at > _IDLE_S:
                self._remove(node_id)
            else:
                self._poll_agent(node_id, agent)

    def close(self) -> None:
        """End all agents; to be called before the driver disconnects."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=RPC_TIMEOUT_S)
        for node_id in list(self._agents):
            self._remove(node_id)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.poll()
            except Exception as error:
                # A cluster that does not answer is not ours to report, only to survive.
                logger.debug("preemption agents: %s: %s", type(error).__name__, error)
            self._stop.wait(_ROUND_S)

    def _nodes(self) -> tuple[set[str], set[str]]:
        """Nodes on which something has resources and that may be watched, and all that are alive."""
        import ray
        from ray._private import state

        # On the driver's own machine no process is needed to know that it is on no cloud.
        here = own_addresses() if self._notices == "auto" and detect_cloud() is None else set()
        free = state.available_resources_per_node()
        busy, alive = set(), set()
        for node in ray.nodes():
            if not node["Alive"]:
                continue
            alive.add(node["NodeID"])
            works = _in_use(node["Resources"], free.get(node["NodeID"], {}))
            if works and node["NodeManagerAddress"] not in here:
                busy.add(node["NodeID"])
        return busy, alive

    def _make(self, node_id: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = ray.remote(PreemptionAgent).options(
            num_cpus=0,
            max_concurrency=2,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        return remote.remote(self._notices)

    def _poll_agent(self, node_id: str, agent: _Agent) -> None:
        import ray

        if agent.answer is None:
            agent.answer = agent.actor.lines.remote(
                agent.seen, _LONG_POLL_S if node_id in self.clouds else 0.0
            )
        ready, _ = ray.wait([agent.answer], timeout=0)
        if not ready:
            return
        try:
            cloud, lines = ray.get(agent.answer)
        except ray.exceptions.RayError as error:
            # The node may just have gone, and then it is no longer alive in the next round.
            self._failed[node_id] = (
                time.monotonic(),
                (str(error).strip() or type(error).__name__).splitlines()[-1],
            )
            self._remove(node_id)
            return
        self.clouds[node_id] = cloud
        for line in lines:
            logger.info("node %s: %s", node_id[:8], line)
        agent.seen += len(lines)
        agent.answer = None
        if cloud is None:
            self._remove(node_id)

    def _remove(self, node_id: str) -> None:
        import ray

        agent = self._agents.pop(node_id)
        if not ray.is_initialized():
            return  # the driver of a lost cluster has left it already, and `ray.kill` would start another
        with suppress(Exception):  # at the end of a run the cluster may be gone before its agents
            ray.kill(agent.actor)


@contextmanager
def watch_for_preemption(notices: PreemptionNotices) -> Iterator[PreemptionAgents]:
    """Agents on the connected cluster's nodes while the block runs."""
    agents = PreemptionAgents(notices)
    agents.start()
    try:
        yield agents
    finally:
        agents.close()


def watched_cloud(notices: PreemptionNotices) -> Cloud | None:
    """Whose metadata service this machine's agent asks; None for none at all."""
    if notices == "auto":
        return detect_cloud()
    return None if notices == "off" or notices == "kubernetes" else notices


def main(arguments: Sequence[str] | None = None) -> int:
    """The agent of this machine as a process of its own; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        _use_token()
        drainer = NodeDrainer(_gcs_address(options.address), options.node_id)
        if options.now:
            return _drain_and_wait(drainer, "asked to leave", options.grace_s)
        terminated = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())
        cloud = watched_cloud(options.notices)
        logger.info("watching %s", f"the metadata service of {cloud}, and SIGTERM" if cloud else "SIGTERM")
        if cloud is None:
            terminated.wait()
        else:
            NoticeWatcher(metadata_client(cloud), drainer).run(terminated)
        return _drain_and_wait(drainer, "SIGTERM", options.grace_s)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.elastic.preemption_agent",
        description="Drain this machine's Ray node when its cloud preempts the machine, or on SIGTERM.",
    )
    parser.add_argument(
        "--address",
        help="HOST:PORT of the cluster's head. Default: RAY_ADDRESS, or the cluster on this machine.",
    )
    parser.add_argument("--node-id", help="Id of the Ray node. Default: the only node on this machine.")
    parser.add_argument(
        "--notices",
        choices=get_args(PreemptionNotices),
        default="auto",
        help="Metadata service to poll. auto detects the cloud from this machine's firmware.",
    )
    parser.add_argument(
        "--grace-s", type=float, default=30.0, help="Seconds from SIGTERM to the end of the machine."
    )
    parser.add_argument(
        "--now",
        action="store_true",
        help="Drain at once and wait until the node is gone, for use in a preStop hook.",
    )
    return parser


def _drain_and_wait(drainer: NodeDrainer, source: str, grace_s: float) -> int:
    """Drain, and stay until the node is gone or its time is up; 1 if it could not be drained."""
    deadline = time.time() + grace_s
    pause = 0.5
    drained = False
    while time.time() < deadline:
        try:
            if not drained:
                # An end that was announced before is as good: then there is only its time to wait for.
                drainer.drain(Notice(source, deadline))
                drained = True
                logger.info("%s: drained %.0f s before the end", source, deadline - time.time())
            if not drainer.is_alive():
                logger.info("the node has left")
                return 0
        except UserError:
            raise
        except Exception as error:
            logger.warning("%s: the cluster does not answer: %s", source, error)
        time.sleep(max(0.0, min(pause, deadline - time.time())))
    return 0 if drained else 1


def _use_token() -> None:
    """As `ray start` and `ray.init` do: a token that is there is used, unless RAY_AUTH_MODE says otherwise."""
    from ray._private.authentication import authentication_token_setup as setup

    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _gcs_address(address: str | None) -> str:
    import ray._private.services as services

    try:
        return str(services.canonicalize_bootstrap_address_or_die(address))
    except ConnectionError as error:
        raise UserError(
            "no Ray cluster is known on this machine",
            hint="give the address of its head: --address HOST:6379",
        ) from error


def _in_use(total: dict[str, float], free: dict[str, float]) -> bool:
    """Whether something on a node has resources; objects in its store do not count, they keep nobody busy."""
    return any(
        amount - free.get(name, 0.0) > 1e-6
        for name, amount in total.items()
        if name != "object_store_memory" and not name.startswith("node:")
    )


if __name__ == "__main__":
    # Ray's own lines about a lost head are for a driver; here each is a line of ours.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    sys.exit(main())
