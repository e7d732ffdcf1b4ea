"""Plays a trace for real: raylets come, announce their end and are killed while `orchestrator run` trains.

What it measures is what `predict` predicts for the same trace. Time may run faster than in the trace; what the
engine does takes as long as it takes, so the prediction is made for the compressed trace.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.simulation.trace import Trace, TraceEvent
from tools.market import SpotMarket

logger = logging.getLogger("orchestrator")

_POLL_S = 0.1
# Until the first ones were timed: what a raylet takes to start, and `ray drain-node` to announce an end.
_FIRST_LEAD_S = {"up": 3.0, "notice": 2.0, "down": 0.0}


@dataclass(frozen=True)
class Played:
    """An event of the trace that was made to happen; seconds since the stage started, and `at` since 1970."""

    kind: str
    machine: str
    planned_s: float
    done_s: float
    at: float


@dataclass(frozen=True)
class Replayed:
    """A run that ended.

    Attributes:
        code: how it exited.
        output: what it said.
        began: when its stage started, in seconds since 1970.
        played: what was done to its machines.
    """

    code: int
    output: str
    began: float
    played: tuple[Played, ...]


@dataclass
class _Driver:
    """The `orchestrator run` that is disturbed; reads what it says without ever blocking it."""

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    stage: str
    lines: list[str] = field(default_factory=list)
    began: threading.Event = field(default_factory=threading.Event)
    began_at: float = 0.0  # monotonic
    began_epoch: float = 0.0

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            words = line.split()
            if words[1:3] == [self.stage, "started"]:
                self.began_at, self.began_epoch = time.monotonic(), time.time()
                self.began.set()

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        self._reader.join(timeout=10)
        return code


class Player:
    """Makes the events of a trace happen on a market. To be used in the thread that made the market."""

    def __init__(self, market: SpotMarket, trace: Trace) -> None:
        self._market, self._trace = market, trace
        self._lead = dict(_FIRST_LEAD_S)
        self._over = threading.Event()
        first = [event for event in trace.events if event.at <= 0]
        self._wanted = {self._name(event) for event in first if event.kind == "up"}
        self._events = [event for event in trace.events if event.at > 0 or event.kind == "notice"]

    def prepare(self) -> None:
        """Bring up the machines that are there at second 0, and take away all others."""
        # One whose end an earlier trace announced is there, and will not be for long.
        for name in [*self._market.machines]:
            if name not in self._wanted or name in self._market.leaving:
                self._market.kill(name)
        for name in sorted(self._wanted - set(self._market.machines)):
            self._timed("up", lambda name=name: self._market.add(name))  # type: ignore[misc]

    def play(self, driver: _Driver, timeout_s: float) -> list[Played]:
        """Play until the driver ends, from the moment at which its stage starts.

        Raises:
            TimeoutError: it does not end.
        """
        deadline = time.monotonic() + timeout_s
        while not driver.began.wait(_POLL_S) and driver.process.poll() is None:
            _check(deadline)
        played: list[Played] = []
        coming = [event for event in self._events if event.kind == "up"]
        going = [event for event in self._events if event.kind != "up"]
        # Starting a raylet takes seconds, in this thread; what goes must not wait for what comes.
        other = threading.Thread(target=self._play, args=(going, driver, played))
        other.start()
        try:
            self._play(coming, driver, played)
            while driver.process.poll() is None:
                _check(deadline)
                time.sleep(_POLL_S)
        finally:
            self._over.set()
            other.join()
        return sorted(played, key=lambda event: event.done_s)

    def _play(self, events: Sequence[TraceEvent], driver: _Driver, played: list[Played]) -> None:
        for event in events:
            # What takes time is begun so much before it is to have happened.
            while time.monotonic() - driver.began_at < event.at - self._lead[event.kind]:
                if driver.process.poll() is not None or self._over.wait(_POLL_S):
                    return
            self._make(event)
            done = time.monotonic() - driver.began_at
            played.append(Played(event.kind, self._name(event), event.at, done, time.time()))
            logger.info(
                "replay: %s %s at %.1f s, planned %.1f s", event.kind, self._name(event), done, event.at
            )

    def _make(self, event: TraceEvent) -> None:
        name = self._name(event)
        while event.kind != "up" and name not in self._market.machines and not self._over.wait(_POLL_S):
            pass  # it is late
        if event.kind == "up":
            self._timed("up", lambda: self._market.add(name))
        elif name not in self._market.machines:
            return
        elif event.kind == "notice":
            left = event.deadline_at - event.at
            self._timed("notice", lambda: self._market.drain(name, left))
        else:
            self._market.kill(name)

    def _timed(self, kind: str, act: Callable[[], object]) -> None:
        began = time.monotonic()
        act()
        self._lead[kind] = 0.5 * self._lead[kind] + 0.5 * (time.monotonic() - began)

    def _name(self, event: TraceEvent) -> str:
        return self._trace.machines[event.machine].name


def replay(
    market: SpotMarket,
    trace: Trace,
    command: Sequence[str],
    *,
    stage: str,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
) -> Replayed:
    """Run `command` while the machines of `market` do what `trace` says.

    Args:
        market: keeps what machines it has that the trace begins with; a raylet takes seconds to start.
        trace: in seconds since the stage started; machines have as many slots as the market's.
        command: an `orchestrator run` whose cluster is the market; ended if it outlives `timeout_s`.
        stage: the stage that is disturbed.
        folder: in which the command runs.
        environment: of the command.

    Raises:
        TimeoutError: the command did not end; its last lines are in the message.
    """
    player = Player(market, trace)
    player.prepare()
    driver = _Driver(command, folder, environment, stage)
    try:
        played = player.play(driver, timeout_s)
    except TimeoutError:
        driver.end()
        said = "".join(driver.lines[-20:])
        raise TimeoutError(f"the run did not end within {timeout_s:.0f} s; it said\n{said}") from None
    finally:
        code = driver.end()
    return Replayed(code, "".join(driver.lines), driver.began_epoch, tuple(played))


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError
