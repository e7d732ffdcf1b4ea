"""The Ray cluster a pipeline runs on: its own by default, never one that merely happens to run."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster_check
from orchestrator.elastic.controller_host import hosts
from orchestrator.elastic.nodes import minimal_agents, on_loopback
from orchestrator.elastic.preemption_agent import watch_for_preemption
from orchestrator.elastic.ray_connection import connect, disconnect
from orchestrator.elastic.reaper import Reaper, members
from orchestrator.elastic.resources import cluster_nodes, has_gpus, slot_shape
from orchestrator.errors import ClusterLostError, Stopped, UserError

logger = logging.getLogger("orchestrator")

# A user's own setting wins.
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray lets its workers yield to everything else on a machine; here they are what the machine is for.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    # A process for each CPU that a cluster has, at once, before anybody asks for one: on a busy laptop Ray may then not
    # come up at all. Slots and controllers start their own.
    "RAY_prestart_worker_first_driver": "0",
    # Ray's own answer to SIGTERM is an abort 3 s later, and to a head that is gone the end of the driver after
    # 60 s without a word; both are ours to see and to report.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}

# Ray gives up on parts of a new cluster after 30 s, which a busy machine can take.
START_S = 90
_STORAGE = "RAY_gcs_storage"

# A head that ends more often than that does not end by chance.
_MOST_RESTARTS, _WITHIN_S = 3, 3600.0

_GONE_S = 30.0
_ASK_EVERY_S = 2.0
_DEAD_S = 5.0
_POLL_S = 0.1


class RunningCluster:
    """A cluster that this driver is connected to.

    Attributes:
        dashboard_url: of Ray's dashboard; empty without one.
        token_file: holds the token that an own cluster asks for; empty if the environment brought one.
    """

    dashboard_url = token_file = ""

    def check(self) -> None:
        """Whether the cluster is still there; to be called often, by the thread that started it.

        Raises:
            ClusterLostError: it has gone. This driver is disconnected from it, and nothing of an own one is left.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Disconnect; an own cluster ends."""
        raise NotImplementedError


@contextmanager
def start(
    cluster: Cluster,
    preload: Sequence[str] = (),
    prestart: int = 0,
    elastic: Elastic | None = None,
    say: Callable[[str], None] = logger.warning,
) -> Iterator[RunningCluster]:
    """Connect to the pipeline's cluster, starting one where the address is `local`; leaves nothing behind.

    An own cluster lives in a temporary folder of its own, so neither a running cluster nor the remains of a
    killed one can be mistaken for it.

    Args:
        cluster: which one.
        preload: modules that workers will need, imported before they do.
        prestart: slots of an own cluster to start at once, so that they are warm when the first job comes.
        elastic: the section of the job that they are for.
        say: is told when the start takes a second try.

    Raises:
        UserError: the cluster cannot be started or joined.
        Stopped: SIGTERM came while Ray started.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    own = cluster.address == "local"
    if cluster.dashboard:
        cluster_check.can_have_dashboard(own)
        # Ray Train's metrics, and Ray's, are there for Prometheus only where Ray collects them.
        os.environ.update({"RAY_enable_metrics_collection": "1"})
    running = _start_own(cluster.dashboard, say) if own else JoinedCluster(cluster.address)
    try:
        reconciles = cluster.dashboard or not own
        _open_pool(preload, prestart if own else 0, elastic or Elastic(), reconciles)
        with watch_for_preemption(cluster.preemption_notices):
            yield running
    finally:
        running.close()


class _NotUpError(Exception):
    """Ray did not start: its error on one line, the last lines of its logs, which are gone by now, and their place."""

    def __init__(self, error: Exception, log: list[str], place: Path) -> None:
        first = next(iter(str(error).strip().splitlines()), "")
        super().__init__(f"{type(error).__name__}: {first}")
        self.log = log
        self.place = place


class OwnCluster(RunningCluster):
    """A cluster of one node, this machine, in a folder of its own; ends with the driver, however that ends."""

    def __init__(self, dashboard: bool = False) -> None:
        self._folder = cluster_check.short_folder()
        self._reaper = Reaper(self._folder)
        self._closed = False
        self._lost: ClusterLostError | None = None
        self._restarts: list[float] = []
        self._environment = contextlib.ExitStack()
        try:
            settings = {**_start_waits(), **self._token(), **self._storage()}
            self._environment.enter_context(_environment(settings))
            agents = contextlib.nullcontext() if dashboard else minimal_agents()
            with self._reaper.marking(), agents, on_loopback():
                context = connect(
                    address="local",
                    num_cpus=_slots(),
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    # Ray opens its folders to everybody; the one above them is the owner's alone.
                    _temp_dir=str(self._folder / "r"),
                )
            self.dashboard_url = f"http://{context.dashboard_url}" if dashboard else ""
            self._head, self._node = _process("gcs_server"), _process("raylet")
            self._head_command = _command(self._head)
        except BaseException as error:
            log = cluster_check.last_lines(self.logs)
            self._closed = True
            self._end()
            if isinstance(error, Stopped) or not isinstance(error, Exception):
                raise
            raise _NotUpError(error, log, self._folder.parent) from error

    @property
    def logs(self) -> Path:
        """Where Ray's logs of this cluster are."""
        return self._folder / "r" / "session_latest" / "logs"

    def check(self) -> None:
        """See `RunningCluster`. A head that ended is started anew with all it knew, so nobody loses anything by it;
        the node takes all workers along."""
        if self._lost is not None:
            raise self._lost
        if self._closed:
            return
        if (code := self._node.poll()) is not None:
            self._lose(f"the only node (raylet) of the pipeline's own Ray cluster ended ({_ending(code)})")
        if (code := self._head.poll()) is not None:
            what = f"the head (GCS) of the pipeline's own Ray cluster ended ({_ending(code)})"
            now = time.monotonic()
            self._restarts = [at for at in self._restarts if now - at < _WITHIN_S] + [now]
            if os.environ.get(_STORAGE) != "rocksdb":
                self._lose(what)
            if len(self._restarts) > _MOST_RESTARTS:
                self._lose(f"{what}, for the {len(self._restarts)}th time within an hour")
            logger.warning("%s: it is restarted, and the run continues", what)
            self._restart_head()

    def _restart_head(self) -> None:
        from ray._private import worker

        with self._reaper.marking():
            # A session of its own, as Ctrl-C is not meant for it.
            self._head = subprocess.Popen(
                self._head_command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        processes = worker._global_node.all_processes
        processes["gcs_server"] = [processes["gcs_server"][0]._replace(process=self._head)]

    def _lose(self, what: str) -> NoReturn:
        log = "\n".join(cluster_check.last_lines(self.logs))
        logger.debug("%s; Ray's logs end with:\n%s", what, log)
        self._lost = ClusterLostError(what, own=True)
        self.close()
        raise self._lost

    def close(self) -> None:
        """See `RunningCluster`."""
        from ray._private.state import state

        if self._closed:
            return
        self._closed = True
        if self._lost is None:
            _close_pool()
        # A second faster than Ray, which waits for each process in turn; and the workers of a lost cluster must not
        # write any more. The head is last: who asks a dead one waits for ever.
        self._kill_all_but_head()
        state.disconnect()
        self._end()

    def _end(self) -> None:
        disconnect()
        self._reaper.close()
        self._environment.close()

    def _kill_all_but_head(self) -> None:
        deadline = time.monotonic() + _DEAD_S
        while pids := set(members(str(self._folder))) - {self._head.pid}:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)

    def _storage(self) -> Mapping[str, str]:
        """Where the head keeps what it knows, for the one that is started in its place."""
        if _STORAGE in os.environ:
            return {}
        return {_STORAGE: "rocksdb", "RAY_gcs_storage_path": str(self._folder / "gcs")}

    def _token(self) -> Mapping[str, str]:
        """Ray protects a new cluster with a token that it keeps below HOME, which may not be there."""
        named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
        if named or ("RAY_AUTH_MODE" in os.environ and (not _wants_token() or _has_token())):
            return {}
        path = self._folder / "token"
        self.token_file = str(path)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32))
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


class JoinedCluster(RunningCluster):
    """Somebody else's cluster at `auto` or `host:port`, which goes on when the driver leaves."""

    def __init__(self, address: str) -> None:
        self._closed = False
        self._lost: ClusterLostError | None = None
        self._environment = contextlib.ExitStack()
        self._environment.enter_context(_environment(_known_token() if address == "auto" else {}))
        try:
            self._address = cluster_check.reach(address)
            connect(address=self._address)
        except BaseException as error:
            self._environment.close()
            if isinstance(error, RuntimeError) and "ersion mismatch" in str(error):
                raise UserError(
                    str(error), hint="install the same versions of Ray and Python here and on the cluster"
                ) from error
            raise
        self._asked = self._answered = time.monotonic()

    def check(self) -> None:
        """See `RunningCluster`. A head may be started anew, so it has half a minute."""
        if self._lost is not None:
            raise self._lost
        if self._closed or time.monotonic() - self._asked < _ASK_EVERY_S:
            return
        why = cluster_check.answers(self._address, 1.0)
        self._asked = time.monotonic()
        if why is None:
            self._answered = self._asked
        elif self._asked - self._answered > _GONE_S:
            what = f"the Ray cluster at {self._address} has not answered for {_GONE_S:.0f} s ({why})"
            self._lost = ClusterLostError(what, own=False)
            self.close()
            raise self._lost

    def close(self) -> None:
        """See `RunningCluster`."""
        if self._closed:
            return
        self._closed = True
        if self._lost is None:
            _close_pool()
        disconnect()
        self._environment.close()


def _start_own(dashboard: bool, say: Callable[[str], None]) -> OwnCluster:
    try:
        return OwnCluster(dashboard)
    except _NotUpError as error:
        cluster_check.raise_if_full(error, error.place)
        say(f"Ray did not start: {error} (load {cluster_check.load()}); trying once more")
    try:
        return OwnCluster(dashboard)
    except _NotUpError as error:
        cluster_check.raise_if_full(error, error.place)
        raise cluster_check.did_not_start(str(error), error.log, START_S) from error


def _open_pool(preload: Sequence[str], prestart: int, elastic: Elastic, reconciles: bool) -> None:
    """The controllers and the pool of warm workers of the cluster that this driver has just connected to."""
    # Ray Train, too, is imported by this thread: two that import Ray at once may find it half there.
    hosts.begin(preload, elastic.heartbeat_timeout_s, reconciles=reconciles)
    if prestart:
        hosts.prestart(prestart, slot_shape(elastic, 1.0, has_gpus(elastic, cluster_nodes())))


def _close_pool() -> None:
    """End them; those of a lost cluster are only forgotten, by the next ones that are opened."""
    hosts.end()


def _process(kind: str) -> subprocess.Popen[bytes]:
    """A process of the own cluster that `ray.init` has just started."""
    from ray._private import worker

    process: subprocess.Popen[bytes] = worker._global_node.all_processes[kind][0].process
    return process


def _command(head: subprocess.Popen[bytes]) -> list[str]:
    """What starts this head again, at the port that it has found."""
    import ray

    assert isinstance(head.args, list)
    port = ray.get_runtime_context().gcs_address.rpartition(":")[2]
    flag = "--gcs_server_port="
    return [f"{flag}{port}" if str(part).startswith(flag) else str(part) for part in head.args]


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _start_waits() -> dict[str, str]:
    waits = {
        "RAY_gcs_server_port_wait_time_s": START_S,
        "RAY_raylet_start_wait_time_s": START_S,
        "RAY_agent_register_timeout_ms": START_S * 1000,
        "RAY_worker_register_timeout_seconds": START_S,
    }
    return {name: str(wait) for name, wait in waits.items() if name not in os.environ}


def _known_token() -> Mapping[str, str]:
    """As `ray.init` does for `auto`: where a token is there, it is used."""
    return {} if "RAY_AUTH_MODE" in os.environ or not _has_token() else {"RAY_AUTH_MODE": "token"}


def _wants_token() -> bool:
    return os.environ["RAY_AUTH_MODE"].lower() == "token"


def _has_token() -> bool:
    """Whether Ray finds one: in the environment, in a file that it names, or below HOME."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """These variables for this process and its children; Ray keeps what it read of them, and reads them anew."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    _read_anew()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_anew()


def _read_anew() -> None:
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def most_object_store() -> int:
    """Bytes that the object store of an own cluster has at most: Ray takes 30 % of the memory, or less."""
    return int(0.3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _slots() -> int:
    """Logical CPUs: places for workers, not cores. A teacher and several students share a laptop's cores."""
    return max(8, os.cpu_count() or 1)
