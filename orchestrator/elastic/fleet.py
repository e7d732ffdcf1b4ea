"""The seats of one driver: made where the cluster has room, warm, lent to jobs, handed on from stage to stage.

A job says how many workers it wants; the fleet asks Ray for as many seats. Those for which there is no room yet
stay pending, which is what makes an autoscaler add machines. Nothing is waited for: a job takes what is warm.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.elastic.seat import Seat

logger = logging.getLogger("orchestrator")

_POLL_S = 1.0
_DRAIN_POLL_S = 0.5
_IDLE_S = 30.0

Health = Literal["placing", "warming", "warm", "lost"]


@dataclass(frozen=True)
class Shape:
    """What one worker takes: a CPU, or a share of a GPU."""

    cpus: float = 1.0
    gpus: float = 0.0


@dataclass
class Place:
    """A seat as the driver sees it.

    Attributes:
        job: who has it.
        health: `placing` until Ray found room, `warming` while it imports.
        leaving: its node announced its end, or another job needs it more.
        heard: when it last answered, monotonic.
    """

    name: str
    actor: Any
    shape: Shape
    health: Health = "placing"
    node: str = ""
    host: str = ""
    job: str | None = None
    draining: bool = False
    recalled: bool = False
    heard: float = field(default_factory=time.monotonic)
    idle_since: float = field(default_factory=time.monotonic)
    pending: dict[str, Any] = field(default_factory=dict)
    inbox: list[dict[str, Any]] = field(default_factory=list)
    token: str = ""
    silence: float = 0.0

    @property
    def leaving(self) -> bool:
        """Whether a group should do without it."""
        return self.draining or self.recalled


@dataclass
class Demand:
    """How many workers a job wants; an entry of the fleet's books."""

    fewest: int
    most: int
    shape: Shape


class Fleet:
    """All seats of this driver's cluster. Thread-safe; every controller's loop drives it by calling `look`.

    Args:
        preload: modules worth importing before the first job.
        silence_s: a seat that has not answered for so long is given up.
    """

    def __init__(self, preload: Sequence[str] = (), silence_s: float = 15.0) -> None:
        self._preload = tuple(preload)
        self._silence_s = silence_s
        self._places: dict[str, Place] = {}
        self._demands: dict[str, Demand] = {}
        self._lock = threading.RLock()
        self._made = 0
        self._drained_at = 0.0
        self._draining: dict[str, int] = {}

    # --- what jobs do -----------------------------------------------------------------------------------------

    def want(self, job: str, fewest: int, most: int, shape: Shape) -> None:
        """`job` would use up to `most` seats; those it lacks are asked for."""
        with self._lock:
            self._demands[job] = Demand(fewest, most, shape)
            self._ask(shape)

    def prewarm(self, number: int, shape: Shape) -> None:
        """Make seats before a job asks for them."""
        with self._lock:
            for _ in range(number):
                self._make(shape)

    def leave(self, job: str) -> None:
        """`job` needs none any more; its seats stay warm for the next one."""
        with self._lock:
            demand = self._demands.pop(job, None)
            self.give_back(job)
            if demand is not None:
                self._drop_surplus(demand.shape)

    def on_offer(self, job: str) -> list[Place]:
        """Warm seats that `job` has or may take, its own first; enough for others' fewest is left."""
        with self._lock:
            demand = self._demands[job]
            mine = [place for place in self._warm(demand.shape) if place.job == job]
            idle = [place for place in self._warm(demand.shape) if place.job is None]
            others = [name for name in self._demands if name != job]
            owed = sum(max(0, self._demands[name].fewest - self._held(name)) for name in others)
            # Also a job without any leaves others theirs: two that each took all would take turns for ever.
            needs = max(0, demand.fewest - len(mine))
            free = max(min(needs, len(idle)), len(idle) - owed)
            self._recall(job, demand, len(mine) + free)
            return mine + idle[:free]

    def warming(self, job: str) -> int:
        """Seats that will be warm in a few seconds."""
        with self._lock:
            shape = self._demands[job].shape
            return sum(place.health == "warming" and place.shape == shape for place in self._places.values())

    def take(self, job: str, names: Sequence[str]) -> list[Place] | None:
        """Take these seats and give back all others; None if one of them is not to be had any more."""
        with self._lock:
            places = [self._places.get(name) for name in names]
            if any(
                place is None or place.health != "warm" or place.job not in (None, job) for place in places
            ):
                return None
            self.give_back(job)
            for place in places:
                assert place is not None
                place.job, place.inbox = job, []
            return [place for place in places if place is not None]

    def give_back(self, job: str) -> None:
        """Nobody works on the seats of `job` any more."""
        with self._lock:
            for place in self._places.values():
                if place.job == job:
                    place.job, place.recalled, place.idle_since = None, False, time.monotonic()

    def get(self, name: str) -> Place | None:
        """The seat, or None once it is lost."""
        with self._lock:
            place = self._places.get(name)
            return place if place is not None and place.health != "lost" else None

    def give_up(self, name: str) -> None:
        """This seat does not answer: kill it, and ask for another."""
        with self._lock:
            place = self._places.get(name)
            if place is not None:
                self._lose(place, "it does not answer")

    def close(self) -> None:
        """Kill all seats."""
        import ray

        with self._lock:
            for place in self._places.values():
                ray.kill(place.actor)
            self._places.clear()

    # --- what keeps the books true ----------------------------------------------------------------------------

    def look(self, timeout: float) -> None:
        """Take in what seats say and what became of them; waits at most `timeout` seconds for news."""
        import ray

        with self._lock:
            refs = {ref: place for place in self._places.values() for ref in self._refs(place)}
        if refs:
            ready, _ = ray.wait(list(refs), num_returns=1, timeout=timeout)
            if ready:
                ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        else:
            time.sleep(timeout)
            ready = []
        with self._lock:
            for ref in ready:
                self._take_in(refs[ref], ref)
            self._notice_drains()
            self._notice_silence()
            self._drop_idle()

    def _refs(self, place: Place) -> list[Any]:
        if place.health == "lost":
            return []
        if not place.pending:
            call = {"placing": "where", "warming": "warm", "warm": "events"}[place.health]
            method = getattr(place.actor, call)
            place.pending[call] = method.remote(_POLL_S) if call == "events" else method.remote()
        return list(place.pending.values())

    def _take_in(self, place: Place, ref: Any) -> None:
        import ray

        call = next((name for name, pending in place.pending.items() if pending == ref), None)
        if call is None or place.health == "lost":
            return  # another controller was faster
        del place.pending[call]
        try:
            answer = ray.get(ref)
        except ray.exceptions.RayError as error:
            self._lose(place, type(error).__name__)
            return
        place.heard = time.monotonic()
        if call == "where":
            place.node, place.host, place.health = answer["node"], answer["host"], "warming"
        elif call == "warm":
            place.health, place.idle_since = "warm", time.monotonic()
        else:
            place.silence = answer["silence"]
            if answer["token"] == place.token:
                place.inbox += answer["events"]

    def _lose(self, place: Place, why: str) -> None:
        logger.info("seat %s on node %s is lost: %s", place.name, place.node[:8] or "?", why)
        self._remove(place)
        self._ask(place.shape)

    def _remove(self, place: Place) -> None:
        import ray

        # Another controller may be waiting for an answer of this seat right now, and must not miss it again.
        place.health = "lost"
        ray.kill(place.actor)
        del self._places[place.name]

    def _ask(self, shape: Shape) -> None:
        """Make as many seats as the jobs want in all."""
        wanted = sum(demand.most for demand in self._demands.values() if demand.shape == shape)
        # In the place of one whose node is about to go another can warm up meanwhile.
        there = sum(place.shape == shape and not place.draining for place in self._places.values())
        for _ in range(wanted - there):
            self._make(shape)

    def _make(self, shape: Shape) -> None:
        import ray

        self._made += 1
        name = f"seat-{self._made}"
        remote = ray.remote(Seat).options(
            num_cpus=shape.cpus, num_gpus=shape.gpus, max_concurrency=8, max_restarts=0
        )
        self._places[name] = Place(name, remote.remote(_environment(shape), self._preload), shape)

    def _drop_surplus(self, shape: Shape) -> None:
        """Seats that are not even placed are of no use to a job that is gone."""
        wanted = sum(demand.most for demand in self._demands.values() if demand.shape == shape)
        pending = [
            place for place in self._places.values() if place.shape == shape and place.health == "placing"
        ]
        there = sum(place.shape == shape for place in self._places.values())
        for place in pending[: max(0, there - wanted)]:
            self._remove(place)

    def _drop_idle(self) -> None:
        """Give the machines back that no job has used for a while."""
        if self._demands:
            return
        for place in list(self._places.values()):
            if place.health == "warm" and time.monotonic() - place.idle_since > _IDLE_S:
                self._remove(place)

    def _notice_drains(self) -> None:
        if time.monotonic() - self._drained_at < _DRAIN_POLL_S:
            return
        self._drained_at = time.monotonic()
        self._draining = draining_nodes()
        noticed = [
            place for place in self._places.values() if place.node in self._draining and not place.draining
        ]
        for place in noticed:
            place.draining = True
        for shape in {place.shape for place in noticed}:
            self._ask(shape)

    def _notice_silence(self) -> None:
        now = time.monotonic()
        for place in list(self._places.values()):
            if place.health == "warm" and now - place.heard > self._silence_s + _POLL_S:
                self._lose(place, f"silent for {now - place.heard:.0f} s")

    def _recall(self, job: str, demand: Demand, has: int) -> None:
        """A job below its fewest gets back what others have beyond theirs."""
        missing = demand.fewest - has
        for place in self._warm(demand.shape):
            if missing <= 0:
                return
            if place.recalled:
                missing -= 1
            elif place.job not in (None, job):
                other = self._demands.get(place.job or "")
                staying = sum(p.job == place.job and not p.leaving for p in self._places.values())
                if other is not None and staying > other.fewest:
                    place.recalled = True
                    missing -= 1

    def _warm(self, shape: Shape) -> list[Place]:
        return [place for place in self._places.values() if place.health == "warm" and place.shape == shape]

    def _held(self, job: str) -> int:
        return sum(place.job == job for place in self._places.values())


def shape(device: str, gpus: float) -> Shape:
    """What a worker takes on this cluster, where `auto` is a GPU if there is any now."""
    import ray

    gpu = device == "gpu" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return Shape(0.0, gpus) if gpu else Shape()


_current: Fleet | None = None


def current() -> Fleet:
    """The fleet of the cluster this driver is connected to; made at first use."""
    global _current
    if _current is None:
        _current = Fleet()
    return _current


def begin(preload: Sequence[str]) -> Fleet:
    """A new fleet for the cluster this driver has just connected to."""
    global _current
    _current = Fleet(preload)
    return _current


def end() -> None:
    """Kill all seats; to be called before the driver disconnects."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def _environment(shape: Shape) -> dict[str, str]:
    shared = {"TOKENIZERS_PARALLELISM": "false"}
    if shape.gpus:
        # The zygote must not touch a device: a process that did cannot be forked.
        return {**shared, "DS_ACCELERATOR": "cuda", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    # One thread a worker: more workers, not more threads, is how a step gets faster, and results do not
    # depend on how many cores the machine has.
    return {**shared, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def draining_nodes() -> dict[str, int]:
    """Nodes that have announced their end, with their deadline in milliseconds since 1970 (0: none given)."""
    import ray
    from ray._private.state import state

    if ray.util.client.ray.is_connected():
        # A client's process is no part of the cluster; a task is.
        return dict(ray.get(ray.remote(num_cpus=0)(draining_nodes).remote()))
    return dict(state.get_draining_nodes())
