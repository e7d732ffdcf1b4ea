"""Heartbeats: what a process writes to the store while it lives, and what others conclude from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.fsio import NotAFileError
from orchestrator.pipeline.lease.lock_queue import LockTakenError, QueueEntry
from orchestrator.pipeline.lease.process_identity import ProcessIdentity, lives
from orchestrator.storage.store import Store


@dataclass(frozen=True)
class Timing:
    """Seconds between heartbeats, and without one until a hold is lost."""

    heartbeat_s: float = 3.0
    timeout_s: float = 60.0

    @property
    def poll_s(self) -> float:
        """Seconds between looks while waiting for a heartbeat."""
        return min(0.5, self.heartbeat_s / 4)


def clock() -> float:
    """Seconds that also pass while the machine sleeps, where the system counts them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def heartbeat_name(who: ProcessIdentity) -> str:
    """The object that a process rewrites while it lives."""
    return _heartbeat_of(who.process)


def _heartbeat_of(process: str) -> str:
    return f"holds/{process}.beat"


@dataclass
class _Seen:
    heartbeat: bytes | None
    since: float
    last_look: float


class HeartbeatMonitor:
    """What this process saw of others' heartbeats."""

    def __init__(self, store: Store, timing: Timing) -> None:
        self._store = store
        self._timing = timing
        self._seen: dict[str, _Seen] = {}
        self._dead: dict[str, str] = {}

    def alive(self, who: ProcessIdentity) -> bool | None:
        """Whether it lives; None while that is open."""
        by_kernel = lives(who)
        if by_kernel is not None:
            if not by_kernel:
                self._dead[who.process] = "which is gone"
            return by_kernel
        # Two clock readings: this process may sleep between one of them and the look.
        before, heartbeat, after = clock(), self._read(who), clock()
        seen = self._seen.setdefault(who.process, _Seen(heartbeat, after, before))
        # After a long time without a look a changed heartbeat only says that it lived at some time in between.
        fresh = after - seen.last_look < self._timing.timeout_s
        seen.last_look = before
        if heartbeat != seen.heartbeat:
            seen.heartbeat, seen.since = heartbeat, after
            return True if fresh else None
        without_s = before - seen.since
        if without_s < self._timing.timeout_s + self._timing.heartbeat_s:
            return None
        self._dead[who.process] = f"without a heartbeat for {without_s:.0f} s"
        return False

    def why(self, who: ProcessIdentity) -> str:
        """Why it was taken for dead."""
        return self._dead.get(who.process, "which is gone")

    def remove_stale(self) -> None:
        """Remove what the dead left."""
        for process in self._dead:
            self._store.delete(_heartbeat_of(process))
        self._dead.clear()

    def _read(self, who: ProcessIdentity) -> bytes | None:
        try:
            return self._store.get_bytes(heartbeat_name(who))
        except (FileNotFoundError, NotAFileError):
            return None


class Contender:
    """How a process that wants a hold behaves in the queue for it: a `LivenessCheck` of the lock queue.

    Args:
        watch: tells the living from the dead.
        timing: the store's.
        what: is wanted, for messages.
        notify: tells the user.

    Attributes:
        notes: of the dead holders that were replaced.
    """

    def __init__(
        self, watch: HeartbeatMonitor, timing: Timing, what: str, notify: Callable[[str], None]
    ) -> None:
        self.notes: list[str] = []
        self._watch = watch
        self._timing = timing
        self._what = what
        self._notify = notify
        self._met: dict[str, float] = {}
        self._mentioned: set[str] = set()
        self._pauses = 0

    def judge(self, who: ProcessIdentity) -> bool | None:
        """Whether it lives; None while that is open."""
        alive = self._watch.alive(who)
        now = clock()
        known_for = now - self._met.setdefault(who.process, now)
        if alive and known_for > self._timing.timeout_s:
            # It lives and does not get on: it was suspended while it chose its number.
            raise LockTakenError(who)
        if (
            alive is None
            and known_for > 1.5 * self._timing.heartbeat_s
            and who.process not in self._mentioned
        ):
            self._mentioned.add(who.process)
            timeout = f"{self._timing.timeout_s:.0f} s"
            self._notify(f"{who} sends no heartbeat; {self._what} is taken over after {timeout} without one")
        return alive

    def removed(self, who: ProcessIdentity, entry: QueueEntry) -> None:
        """Note that a dead holder was replaced."""
        note = f"taken over from {who}, {self._watch.why(who)}"
        # It may have left more than one entry.
        if entry.number is not None and note not in self.notes:
            self.notes.append(note)
            self._notify(note)

    def pause(self) -> None:
        """Wait, a little longer every time."""
        time.sleep(min(0.01 * 2**self._pauses, self._timing.poll_s))
        self._pauses = min(self._pauses + 1, 10)
