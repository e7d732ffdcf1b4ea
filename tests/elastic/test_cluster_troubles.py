"""Ray's own troubles: each ends in one message with a cure, and nothing is left behind. Real clusters throughout."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from ports import free_port

from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster, cluster_check
from orchestrator.elastic.cluster import JoinedCluster, OwnCluster, RunningCluster
from orchestrator.elastic.reaper import MARK, Reaper, members
from orchestrator.errors import ClusterLostError, Stopped, UserError
from tools.market import SpotMarket

REACH = "import sys; from orchestrator.elastic.cluster_check import reach; reach(sys.argv[1])"


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the own clusters that the test has started, the newest last."""
    made: list[Path] = []
    real = cluster_check.short_folder

    def recorded() -> Path:
        made.append(real())
        return made[-1]

    monkeypatch.setattr(cluster_check, "short_folder", recorded)
    return made


@pytest.fixture
def own(folders: list[Path]) -> Iterator[OwnCluster]:
    """A pipeline's own cluster."""
    running = OwnCluster()
    yield running
    running.close()
    assert not folders[-1].exists()
    assert not members(str(folders[-1]))


@contextlib.contextmanager
def when_the_head_starts(act: Callable[[], None]) -> Iterator[None]:
    """Does `act` as soon as this process has a child that is Ray's head."""
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.01):
            if any(child.name() == "gcs_server" for child in psutil.Process().children()):
                act()
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def check_for(running: RunningCluster, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        running.check()
        time.sleep(0.1)


def remote_pid() -> int:
    """The process of a task on the connected cluster."""
    import ray

    return int(ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote(), timeout=60))


# --- starting -----------------------------------------------------------------------------------------------------


def break_heads(monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    """The heads of the first `tries` clusters end at once, as they do not know how to keep their state."""
    count = 0
    real = OwnCluster._storage

    def storage(self: OwnCluster) -> Mapping[str, str]:
        nonlocal count
        count += 1
        settings = dict(real(self))
        if count <= tries:
            settings["RAY_gcs_storage"] = "clay tablets"
        return settings

    monkeypatch.setattr(OwnCluster, "_storage", storage)
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "15")


@pytest.mark.slow
@pytest.mark.own_process
def test_a_start_that_fails_is_tried_again(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    break_heads(monkeypatch, tries=1)
    said: list[str] = []
    with cluster.start(Cluster(), say=said.append) as running:
        running.check()
        assert remote_pid() in members(str(folders[1]))
        assert not members(str(folders[0])), "the first try is not cleaned up"
    (line,) = said
    assert "trying once more" in line
    assert "cores" in line
    assert not any(folder.exists() for folder in folders)


@pytest.mark.slow
@pytest.mark.own_process
def test_ray_that_does_not_come_up_is_one_message(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_heads(monkeypatch, tries=2)
    with pytest.raises(UserError) as raised, cluster.start(Cluster(), say=lambda _: None):
        raise AssertionError("it is up")
    assert "Ray did not start in two tries" in raised.value.what
    assert f"on {len(os.sched_getaffinity(0))} cores" in raised.value.what
    assert "gcs_server" in raised.value.what.partition("its logs end with")[2]
    assert "RAY_gcs_server_port_wait_time_s" in str(raised.value.hint)
    assert len(folders) == 2
    assert not any(folder.exists() or members(str(folder)) for folder in folders)


def test_the_end_of_a_log_is_reported(tmp_path: Path) -> None:
    (tmp_path / "raylet.out").write_text("long ago\n" * 9 + "no space\n[state-dump] noise\n\nit ends\n")
    assert cluster_check.last_lines(tmp_path)[-2:] == ["raylet.out: no space", "raylet.out: it ends"]
    message = str(cluster_check.did_not_start("it hangs", cluster_check.last_lines(tmp_path), 90))
    assert message.index("it hangs") < message.index("raylet.out: it ends")


@pytest.mark.own_process
def test_sigterm_while_ray_starts_is_a_stop(folders: list[Path]) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with (
            when_the_head_starts(lambda: os.kill(os.getpid(), signal.SIGTERM)),
            pytest.raises(Stopped),
            cluster.start(Cluster()),
        ):
            raise AssertionError("it went on")
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2, "the handler of before is not there"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not folders[0].exists()


@pytest.mark.own_process
def test_sigterm_in_a_callback_while_ray_starts_is_a_stop(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what a callback of a fork raises."""
    import ray

    real = ray.init

    to_send: list[signal.Signals] = []
    os.register_at_fork(before=lambda: to_send and signal.raise_signal(to_send.pop()))

    def init(**options: object) -> object:
        context = real(**options)
        to_send.append(signal.SIGTERM)
        if (child := os.fork()) == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return context

    monkeypatch.setattr(ray, "init", init)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.raises(Stopped), cluster.start(Cluster()):
            raise AssertionError("it went on")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert not folders[0].exists()


@pytest.mark.own_process
def test_signal_handlers_survive_ray() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with cluster.start(Cluster()):
            os.kill(os.getpid(), signal.SIGTERM)
            assert remote_pid(), "the cluster is not there any more"
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_too_long_a_tmpdir_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("a" * 60) / ("b" * 60)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    folder = cluster_check.short_folder()
    assert folder.parent == Path("/tmp")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    monkeypatch.setattr(cluster_check, "_places", lambda: [long, tmp_path / "missing"])
    with pytest.raises(UserError, match="no folder for Ray's sockets") as raised:
        cluster_check.short_folder()
    assert "TMPDIR" in str(raised.value.hint)


@pytest.mark.slow
@pytest.mark.own_process
def test_the_longest_tmpdir_is_not_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = Path("/tmp") / ("x" * (cluster_check._LONGEST_TMPDIR - len("/tmp/")))
    parent.mkdir(exist_ok=True)
    try:
        monkeypatch.setenv("TMPDIR", str(parent))
        running = OwnCluster()
        sockets = list(parent.glob("orch-ray-*/r/session_latest/sockets/*"))
        running.close()
        assert sockets
    finally:
        parent.rmdir()


# --- private ------------------------------------------------------------------------------------------------------


@pytest.mark.own_process
def test_a_cluster_of_its_own_is_private(own: OwnCluster, folders: list[Path]) -> None:
    assert stat.S_IMODE(folders[0].stat().st_mode) == 0o700
    token = folders[0] / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    secret = token.read_text()
    for log in own.logs.rglob("*"):
        assert not log.is_file() or secret not in log.read_text(errors="replace"), log
    for pid in members(str(folders[0])):
        assert secret not in " ".join(psutil.Process(pid).cmdline())


@pytest.mark.own_process
def test_another_pipeline_does_not_join_it(own: OwnCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    found = [entry for entry in cluster_check._addresses() if entry[0] == address]
    assert found == [(address, True)]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_check, "_addresses", lambda: iter(found))
    with pytest.raises(UserError, match="another pipeline's own"):
        JoinedCluster("auto")
    monkeypatch.setattr(cluster_check, "_addresses", lambda: iter(()))
    with pytest.raises(UserError, match="no Ray cluster runs on this machine"):
        JoinedCluster("auto")


@pytest.mark.own_process
def test_a_head_that_refuses_is_told_from_one_that_is_not_there(own: OwnCluster) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    path = os.environ["RAY_AUTH_TOKEN_PATH"]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # An own cluster is on loopback, which Ray takes for the machine's own address in processes without this.
    bare["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    assert asked(address, bare | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path}) == ""
    without = asked(address, bare)
    assert "refuses this driver" in without
    assert "RAY_AUTH_MODE is not set" in without
    assert "hint set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN " in without
    wrong = asked(address, bare | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    assert "the token that is set here is not the cluster's" in wrong


def asked(address: str, environment: dict[str, str]) -> str:
    """What another process with this environment says of the cluster."""
    done = subprocess.run(
        [sys.executable, "-c", REACH, address], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


def test_only_what_belongs_to_a_cluster_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "log").write_text("a log")
    reaper = Reaper(folder)
    reader = subprocess.Popen(["tail", "-f", str(folder / "log")], stdout=subprocess.DEVNULL)
    nested = "import os, subprocess, time; subprocess.Popen(['sleep', '77']); print('on', flush=True); time.sleep(77)"
    with reaper.marking():
        member = subprocess.Popen([sys.executable, "-c", nested], stdout=subprocess.PIPE, text=True)
        # A child that has an environment of its own belongs to it as well.
        parent = subprocess.Popen([sys.executable, "-c", nested.replace("'77']", "'78'], env={}")])
    assert MARK not in os.environ
    assert member.stdout is not None
    member.stdout.readline()
    wait_for(lambda: len(members(str(folder))) == 4)
    children = [psutil.Process(pid) for pid in members(str(folder))]
    reaper.close()
    assert member.wait(20) == parent.wait(20) == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert reader.poll() is None, "a user's process was killed"
    assert not folder.exists()
    reader.kill()
    reader.wait()
    member.stdout.close()


# --- joining ------------------------------------------------------------------------------------------------------


def test_nobody_at_the_address(capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with pytest.raises(UserError, match=f"no Ray cluster answers at '127.0.0.1:{port}'") as raised:
        JoinedCluster(f"127.0.0.1:{port}")
    assert "ray start --head" in str(raised.value.hint)
    assert capfd.readouterr() == ("", "")


@pytest.mark.own_process
def test_somebody_else_at_the_address(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as other,
        pytest.raises(UserError, match="does not answer as a Ray cluster does"),
    ):
        JoinedCluster(f"127.0.0.1:{other.getsockname()[1]}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.own_process
def test_a_joined_cluster_that_goes_ends_the_run_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_GONE_S", 1.0)
    with SpotMarket() as market:
        market.add("one")
        with cluster.start(Cluster(address=market.address)) as running:
            running.check()
            assert remote_pid()
            (head,) = market._cluster.head_node.all_processes["gcs_server"]
            head.process.kill()
            with pytest.raises(ClusterLostError, match="has not answered for 1 s") as raised:
                check_for(running, seconds=60)
            assert not raised.value.own


# --- losing -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.own_process
def test_a_head_that_ends_is_started_anew(own: OwnCluster) -> None:
    import ray

    class Counter:
        def __init__(self) -> None:
            self.calls = 0

        def call(self) -> int:
            self.calls += 1
            return self.calls

    counter = ray.remote(num_cpus=0)(Counter).remote()
    assert ray.get(counter.call.remote()) == 1
    for expected in (2, 3, 4):
        own._head.kill()
        own._head.wait()
        own.check()
        assert remote_pid(), "the new head takes no work"
        assert ray.get(counter.call.remote(), timeout=60) == expected, "the actor did not survive"
    own._head.kill()
    own._head.wait()
    with pytest.raises(ClusterLostError, match="4th time within an hour"):
        own.check()
    with pytest.raises(ClusterLostError):
        own.check()


@pytest.mark.slow
@pytest.mark.own_process
def test_a_lost_node_leaves_nothing_and_makes_room_for_a_new_one(
    own: OwnCluster, folders: list[Path]
) -> None:
    import ray

    ended: list[BaseException] = []
    task = ray.remote(num_cpus=0)(lambda: time.sleep(1000)).remote()

    def wait_for_ever() -> None:
        try:
            ray.get(task)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=wait_for_ever, daemon=True)
    thread.start()
    remote_pid()
    own._node.kill()
    own._node.wait()
    with pytest.raises(ClusterLostError, match=r"only node \(raylet\).*SIGKILL") as raised:
        own.check()
    assert raised.value.own
    thread.join(60)
    assert ended, "a thread still waits for the lost cluster"
    assert not members(str(folders[0]))
    assert not folders[0].exists()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    with cluster.start(Cluster()):
        assert remote_pid()


BUSY_DRIVER = """
import sys, threading, time
import ray
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.errors import ClusterLostError

class Echo:
    def wait(self, seconds):
        time.sleep(seconds)

def ask():
    while True:
        try:
            ray.get([echo.wait.remote(0.001) for _ in range(20)])
            ray.wait([echo.wait.remote(0.001) for _ in range(20)], timeout=0)
        except ray.exceptions.RayError:
            pass

with cluster.start(Cluster()) as running:
    echo = ray.remote(Echo).options(num_cpus=0, max_concurrency=50).remote()
    ray.get(echo.wait.remote(0))
    for _ in range(8):
        threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.3)
    running._node.kill()
    running._node.wait()
    try:
        running.check()
    except ClusterLostError:
        time.sleep(1)
        print("lost, and still here", flush=True)
"""


def test_a_driver_whose_threads_use_the_cluster_outlives_it() -> None:
    """Ray ends a process that asks a core worker which is shut down."""
    done = subprocess.run([sys.executable, "-c", BUSY_DRIVER], capture_output=True, text=True, timeout=300)
    assert "lost, and still here" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr


WAITING_DRIVER = """
import threading, time
import ray
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.elastic.ray_connection import answer_of
from orchestrator.errors import ClusterLostError

class Sleeper:
    def sleep(self):
        time.sleep(1000)

with cluster.start(Cluster()) as running:
    sleeper = ray.remote(Sleeper).options(num_cpus=0, max_concurrency=50).remote()
    started = time.monotonic()
    try:
        answer_of(sleeper.sleep.remote(), 0.3)
    except ray.exceptions.GetTimeoutError:
        print("in time" if 0.3 <= time.monotonic() - started < 30 else "late", flush=True)
    said = []

    def wait():
        try:
            answer_of(sleeper.sleep.remote(), 1000.0)
        except ray.exceptions.RayError as error:
            said.append(error)

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    running._node.kill()
    running._node.wait()
    try:
        running.check()
    except ClusterLostError:
        for thread in threads:
            thread.join(5)
        print(len(said), "threads ended", flush=True)
"""


def test_threads_that_wait_for_an_answer_end_with_the_cluster() -> None:
    """One that stays in `ray.get` does not always: it may spin there for ever, past its own time limit."""
    done = subprocess.run([sys.executable, "-c", WAITING_DRIVER], capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[:2] == ["in time", "20 threads ended"], done.stdout + done.stderr
