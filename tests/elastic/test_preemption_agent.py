"""Notices of clouds and a real SIGTERM become drains of real raylets, with their deadlines."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ports import free_port
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.config.schema import PreemptionNotices
from orchestrator.elastic.cloud_metadata import Notice
from orchestrator.elastic.node_drainer import NodeDrainer
from orchestrator.elastic.preemption_agent import PreemptionAgents, watch_for_preemption
from tools.market import SpotMarket

sys.path.insert(0, str(Path(__file__).parent))
from metadata_servers import AwsServer, AzureServer, GceServer, MetadataServer

PATIENCE_S = 90.0
# What a deadline may be off by: notices have whole seconds, agents round down, and this machine may be busy.
NEAR_S = 6.0

Machines = Callable[[str, MetadataServer | None], str]


@pytest.fixture(scope="module")
def market() -> Iterator[SpotMarket]:
    with SpotMarket() as market:
        market.add("stays")
        ray.init(address=market.address, log_to_driver=False)
        yield market
        ray.shutdown()


@pytest.fixture
def machine(market: SpotMarket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """Adds a machine whose metadata service is the given one; returns its node id."""
    added: list[str] = []

    def add(name: str, server: MetadataServer | None) -> str:
        clouds = {AwsServer: "AWS", GceServer: "GCE", AzureServer: "AZURE"}
        with monkeypatch.context() as patch:
            if server is not None:
                patch.setenv(f"ORCHESTRATOR_{clouds[type(server)]}_METADATA_URL", server.url)
            patch.setenv("ORCHESTRATOR_METADATA_POLL_S", "0.5")
            added.append(name)
            return market.add(name)

    yield add
    for name in added:
        market.kill(name)


@pytest.fixture
def work() -> Iterator[Callable[[str], Any]]:
    """Puts an actor on a node, as a pipeline's workers are: only then has the node an agent."""

    class Worker:
        def pid(self) -> int:
            return os.getpid()

    workers = []

    def start(node_id: str) -> Any:
        where = NodeAffinitySchedulingStrategy(node_id, soft=False)
        worker = ray.remote(Worker).options(num_cpus=1, scheduling_strategy=where).remote()
        ray.get(worker.pid.remote())
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        with suppress(Exception):
            ray.kill(worker)


@pytest.fixture
def agents() -> Iterator[Callable[[PreemptionNotices], PreemptionAgents]]:
    with ExitStack() as stack:
        yield lambda notices: stack.enter_context(watch_for_preemption(notices))


def draining() -> dict[str, float]:
    """Seconds since 1970 by node id."""
    return {node: deadline / 1000 for node, deadline in state.get_draining_nodes().items()}


def eventually(condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"never: {what}")


def agent_processes() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::PreemptionAgent"):
            found.append(process)
    return found


def polled(server: MetadataServer, times: int = 1) -> bool:
    return len(server.served) >= times


def test_an_interruption_drains_its_own_node_once_with_its_deadline(
    machine: Machines, work: Callable[[str], Any], agents: Callable[..., PreemptionAgents]
) -> None:
    """Both machines are watched, of which the second joins later; one is interrupted."""
    with AwsServer() as first, AwsServer() as second:
        watched = agents("aws")
        node = machine("aws-1", first)
        work(node)
        other = machine("aws-2", second)
        work(other)
        eventually(lambda: polled(first, 6) and polled(second, 6), "both machines ask their service")
        assert watched.clouds.get(node) == "aws"
        assert not {node, other} & set(draining())
        ends = first.interrupt(in_s=60)
        eventually(lambda: node in draining(), "the node drains")
        assert draining()[node] == pytest.approx(ends, abs=0.01)
        asked = len(first.served)
        eventually(lambda: len(first.served) >= asked + 4, "the agent goes on asking")
        assert draining()[node] == pytest.approx(ends, abs=0.01), "and announces nothing new"
        assert other not in draining()


@pytest.mark.parametrize("cloud", ["gce", "azure"])
def test_a_preemption_on_gce_and_azure(
    machine: Machines, work: Callable[[str], Any], agents: Callable[..., PreemptionAgents], cloud: Any
) -> None:
    with GceServer() if cloud == "gce" else AzureServer() as server:
        node = machine(cloud, server)
        work(node)
        agents(cloud)
        eventually(lambda: polled(server), "the machine asks its service")
        if isinstance(server, AzureServer):
            ends = server.schedule("Preempt", in_s=30)
        else:
            server.said["preempted"] = "TRUE"
            ends = time.time() + 25
        eventually(lambda: node in draining(), "the node drains")
        assert draining()[node] == pytest.approx(ends, abs=NEAR_S)


def test_hints_garbage_and_refused_tokens_drain_nothing(
    machine: Machines, work: Callable[[str], Any], agents: Callable[..., PreemptionAgents]
) -> None:
    """And after all of that, a real notice still does."""
    with AwsServer() as server:
        server.recommend_rebalance()
        node = machine("aws", server)
        work(node)
        agents("aws")
        eventually(lambda: server.count("/latest/meta-data/events/recommendations/rebalance"), "it is asked")
        server.broken = "garbage"
        eventually(lambda: server.count("/latest/meta-data/spot/instance-action"), "the garbage is read")
        server.broken, server.token = None, "another-token"
        eventually(
            lambda: server.count("/latest/meta-data/spot/instance-action", 401), "the token is refused"
        )
        server.broken = "silent"
        eventually(lambda: any(status == 0 for _, _, status in server.served), "it is not answered")
        assert node not in draining()
        server.broken = None
        ends = server.interrupt(in_s=100)
        eventually(lambda: node in draining(), "the node drains")
        assert draining()[node] == pytest.approx(ends, abs=0.01)


def test_a_dead_agent_is_replaced_and_idle_nodes_have_none(
    machine: Machines, work: Callable[[str], Any], agents: Callable[..., PreemptionAgents],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("orchestrator.elastic.preemption_agent._RESTART_S", 0.5)
    monkeypatch.setattr("orchestrator.elastic.preemption_agent._IDLE_S", 1.0)
    with GceServer() as server:
        node = machine("gce", server)
        watched = agents("gce")
        worker = work(node)
        (first,) = eventually(agent_processes, "an agent starts")
        eventually(lambda: watched.clouds.get(node), "it answers")
        first.kill()
        eventually(lambda: [p for p in agent_processes() if p.pid != first.pid], "another takes its place")
        asked = len(server.served)
        eventually(lambda: len(server.served) > asked, "which asks the service")
        ray.kill(worker)
        eventually(lambda: not agent_processes(), "an idle machine has no agent, so it can be given back")


def test_nobody_is_asked_on_machines_of_no_cloud(
    machine: Machines, work: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` on a machine whose driver can see that it is on no cloud, and on another that looks for itself."""
    node = machine("plain", None)
    work(node)
    local = PreemptionAgents("auto")
    local.poll()
    assert agent_processes() == []
    monkeypatch.setattr("orchestrator.elastic.preemption_agent.own_addresses", lambda: {"192.0.2.99"})
    remote = PreemptionAgents("auto")

    def answered() -> bool:
        remote.poll()
        return node in remote.clouds

    eventually(answered, "the node's agent says what it found")
    assert remote.clouds[node] is None
    eventually(lambda: remote.poll() or not agent_processes(), "it is not kept")
    remote.close()


AGENT = [sys.executable, "-m", "orchestrator.elastic.preemption_agent"]


@contextmanager
def standalone(market: SpotMarket, node: str, *arguments: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    command = [*AGENT, f"--address={market.address}", f"--node-id={node}", *arguments]
    with subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True) as agent:
        try:
            yield agent
        finally:
            agent.kill()


def say_when_watching(agent: subprocess.Popen[str]) -> None:
    assert agent.stderr is not None
    for line in agent.stderr:
        if "watching" in line:
            return
    pytest.fail("the agent ended without watching")


def test_sigterm_of_a_standalone_agent_drains_and_waits_for_the_node(
    market: SpotMarket, machine: Machines, work: Callable[[str], Any]
) -> None:
    node = machine("pod", None)
    worker = work(node)
    with standalone(market, node, "--notices=kubernetes", "--grace-s=60") as agent:
        say_when_watching(agent)
        assert node not in draining()
        agent.send_signal(signal.SIGTERM)
        told = time.time()
        eventually(lambda: node in draining(), "the node drains")
        assert draining()[node] == pytest.approx(told + 60, abs=NEAR_S)
        assert agent.poll() is None, "it holds the pod's end up while something runs on the node"
        ray.kill(worker)
        assert agent.wait(timeout=PATIENCE_S) == 0
        assert time.time() < told + 55, "an empty node ends before its deadline, and the agent with it"


def test_a_prestop_hook_drains_at_once_and_never_later_than_announced(
    market: SpotMarket, machine: Machines, work: Callable[[str], Any]
) -> None:
    node = machine("pod", None)
    worker = work(node)
    drainer = NodeDrainer(market.address, node)
    assert drainer.drain(Notice("first", time.time() + 50))
    with standalone(market, node, "--now", "--grace-s=300") as agent:
        eventually(lambda: "drained" in agent.stderr.readline(), "the hook has drained")  # type: ignore[union-attr]
        assert draining()[node] < time.time() + 51
        assert drainer.drain(Notice("second", time.time() + 30)), "an earlier end is announced anew"
        assert not drainer.drain(Notice("third", time.time() + 40))
        assert draining()[node] == pytest.approx(time.time() + 30, abs=NEAR_S)
        ray.kill(worker)
        assert agent.wait(timeout=PATIENCE_S) == 0


def test_a_standalone_agent_follows_a_metadata_service(
    market: SpotMarket, machine: Machines, work: Callable[[str], Any]
) -> None:
    with AzureServer() as server:
        node = machine("azure", None)
        work(node)
        with standalone(market, node, ORCHESTRATOR_AZURE_METADATA_URL=server.url) as agent:
            say_when_watching(agent)
            server.schedule("Preempt", in_s=30, machine="spot_4")
            eventually(lambda: polled(server, 3), "the service is asked")
            assert node not in draining()
            ends = server.schedule("Terminate", in_s=60)
            eventually(lambda: node in draining(), "the node drains")
            assert draining()[node] == pytest.approx(ends, abs=0.01)


def test_mistakes_of_the_command_line_are_one_message(market: SpotMarket) -> None:
    several = subprocess.run(
        [*AGENT, "--now", f"--address={market.address}"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert several.returncode == 2
    assert "nodes of the Ray cluster" in several.stderr
    assert "--node-id" in several.stderr
    assert "Traceback" not in several.stderr


def test_an_agent_finds_the_node_of_its_own_machine() -> None:
    """As in a pod: all that is said are the head and the token, in the environment."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with head_of_ray(env) as address:
        pod = {**env, "RAY_ADDRESS": address}
        refused = drain_now(pod | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, grace_s=1)
        assert refused.returncode == 1, refused.stderr
        assert "RAY_AUTH_TOKEN" in refused.stderr
        left = drain_now(pod, grace_s=60)
        assert left.returncode == 0, left.stderr
        assert "the node has left" in left.stderr


@contextmanager
def head_of_ray(env: dict[str, str], tries: int = 3) -> Iterator[str]:
    """The address of a head that `ray start` runs.

    On a busy machine Ray gives up after its 30 s, and a port that was free may be taken by then: it is tried again.
    """
    said = ""
    for _ in range(tries):
        # Not below pytest's own folder: Ray's sockets are 50 characters longer, and may have 107.
        folder, port = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), free_port()
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        start += [f"--temp-dir={folder}", "--num-cpus=1", "--include-dashboard=false"]
        start += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
        log = folder / "head.log"
        with log.open("w") as stream:
            head = subprocess.Popen(start, env=env, stdout=stream, stderr=stream, start_new_session=True)
        try:
            until = time.monotonic() + PATIENCE_S
            while head.poll() is None and time.monotonic() < until:
                if "block forever" in log.read_text():
                    yield f"127.0.0.1:{port}"
                    return
                time.sleep(0.1)
            said += f"\n--- ended with {head.returncode}\n{log.read_text()}"
        finally:
            kill_all(head)
            shutil.rmtree(folder)
    pytest.fail(f"no head of Ray came up, {tries} times:{said}")


def kill_all(head: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(head.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    head.kill()
    head.wait()


def drain_now(env: dict[str, str], grace_s: int) -> subprocess.CompletedProcess[str]:
    command = [*AGENT, "--now", f"--grace-s={grace_s}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
