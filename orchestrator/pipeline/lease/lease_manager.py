"""Exclusive holds on names in a store, with any number of machines: leases that a live process keeps renewing.

Who may hold is settled by the queue of :mod:`orchestrator.pipeline.lease.lock_queue`; this module tells the living
from the dead. A process that holds or wants something rewrites one small object, its heartbeat, every few seconds.
No two machines' clocks are compared: a contender watches by its own clock whether the heartbeat changes. Once it
has not for `timeout_s` and one interval more, the holder's entry is removed. On one machine the kernel is asked
instead: a process that is gone is replaced at once, and one that is there never is.

A holder that could not renew for `timeout_s`, or finds its entry removed, has lost its hold. What it was about to
write before that may still arrive: the ledger orders that out by the hold's `epoch`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import disk
from orchestrator.errors import UserError, first_line, shortened
from orchestrator.pipeline.lease.liveness import Contender, HeartbeatMonitor, Timing, clock, heartbeat_name
from orchestrator.pipeline.lease.lock_queue import LockQueue, LockTakenError, QueueEntry
from orchestrator.pipeline.lease.process_identity import ProcessIdentity, is_suspended, lives, this_process
from orchestrator.redact import redacted
from orchestrator.storage.store import Store

_log = logging.getLogger(__name__)


class LeaseLostError(Exception):
    """The hold on a name was lost: another process may have it by now, so nothing more may be written.

    Attributes:
        hint: what to do about it, if that is known.
    """

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.hint = hint


@dataclass(frozen=True)
class Holder:
    """Who holds a name, and whether it lives."""

    who: ProcessIdentity
    alive: bool


class Lease:
    """A hold on a name.

    Attributes:
        epoch: higher than that of every earlier holder of the name.
        notes: how it was got, if a dead holder was in the way.
        lost: why it is lost, or None.
        on_lost: called once it is, in any thread.
    """

    def __init__(
        self, leases: LeaseManager, queue: LockQueue, entry: QueueEntry, what: str, notes: list[str]
    ) -> None:
        assert entry.number is not None
        self.epoch = entry.number
        self.notes = notes
        self.lost: str | None = None
        self._hint: str | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._leases = leases
        self._queue = queue
        self._entry = entry
        self._what = what
        self._lock = threading.RLock()
        self._ended = False
        self._confirmed = leases.last_heartbeat

    def check(self) -> None:
        """Renew the hold: from now on nobody takes it for `timeout_s`.

        Raises:
            LeaseLostError: it is lost.
        """
        with self._lock:
            self.renew()
            if self._since_renewal() >= self._leases.timing.timeout_s:
                # The process slept, or the store took its time, in the middle of that.
                self.renew()
            if self.lost is None and self._since_renewal() >= self._leases.timing.timeout_s:
                self._lose("the store is too slow to renew it in time")
            self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises LeaseLostError if the hold is known to be lost; asks nobody."""
        if self.lost is not None:
            raise LeaseLostError(f"lost the lock on {self._what}: {self.lost}", self._hint)

    def renew(self) -> None:
        """Send a heartbeat, and see that the entry is still in the queue. Errors of the store pass through."""
        timing = self._leases.timing
        with self._lock:
            if self.lost is not None or self._ended:
                return
            without_s = self._since_renewal()
            try:
                began = self._leases.send_heartbeat()
                if without_s >= timing.timeout_s:
                    # This process slept. Whoever took it for dead just before this heartbeat is removing its entry:
                    # give that the time it needs to be seen.
                    time.sleep(timing.heartbeat_s)
                there = self._queue.has(self._entry)
            except Exception as error:
                if self._since_renewal() >= timing.timeout_s:
                    self._lose_for(error)
                raise
            if there:
                self._confirmed = began
            else:
                slept = (
                    f"after {without_s:.0f} s without a heartbeat " if without_s >= timing.timeout_s else ""
                )
                self._lose(f"{slept}its entry in the store was removed, and another process may hold it now")

    def end(self) -> None:
        """It is about to be released: the heartbeat that is under way must not take that for a loss."""
        with self._lock:
            self._ended = True

    def _since_renewal(self) -> float:
        return clock() - self._confirmed

    def _lose_for(self, error: Exception) -> None:
        without = f"for {self._since_renewal():.0f} s"
        if disk.is_full(error):
            self._hint = "free some space on it and run the same command again: it continues there"
            self._lose(
                f"{disk.described(error, [self._leases.root])}, and its heartbeat could not be written {without}"
            )
            return
        self._hint = "check the store, then run the same command again: it continues there"
        self._lose(f"the store could not be reached {without}: {shortened(redacted(first_line(error)), 200)}")

    def _lose(self, why: str) -> None:
        self.lost = why
        _log.warning("lost the lock on %s: %s", self._what, why)
        self.on_lost()


class LeaseManager:
    """The holds of this process in one store.

    Args:
        store: where the objects live, below `holds/`.
        timing: the same for all processes of a store.
        me: this process; another one in tests.
    """

    def __init__(self, store: Store, timing: Timing | None = None, me: ProcessIdentity | None = None) -> None:
        self.timing = timing or Timing()
        self.last_heartbeat = 0.0
        self._store = store
        self._me = me or this_process()
        self._watch = HeartbeatMonitor(store, self.timing)
        self._leases: list[Lease] = []
        # Queues with entries that were released and are still there.
        self._unreleased: list[LockQueue] = []
        self._count = 0
        self._lock = threading.Lock()
        self._users = 0
        self._stop = threading.Event()

    @property
    def root(self) -> Path:
        """Where the store is on this machine."""
        return self._store.root

    @contextlib.contextmanager
    def hold(
        self,
        name: str,
        what: str,
        *,
        above: int | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> Iterator[Lease]:
        """Hold `name` for this process alone.

        Args:
            name: letters, digits, dots and dashes.
            what: what is being held, for messages.
            above: number the holders, from above this: the lease's `epoch` tells a later one from an earlier one.
            notify: tells the user why it takes long, and of a dead holder that was replaced.

        Raises:
            UserError: a living process holds it; the message names it and says since when.
        """
        queue = LockQueue(self._store, f"holds/{name}", fenced=above is not None)
        with self._heartbeats():
            self._retry_releases()
            contender = Contender(self._watch, self.timing, what, notify or _log.warning)
            try:
                entry = queue.acquire(self._me, contender, above=above or 0)
            except LockTakenError as error:
                raise _taken(error.who, what, self._store.uri) from None
            except OSError as error:
                raise _unwritable(error, self._store.root) from None
            finally:
                self._note_unreleased(queue)
            with contextlib.suppress(OSError):  # at the latest the next one does it
                self._watch.remove_stale()
            lease = Lease(self, queue, entry, what, contender.notes)
            self._leases.append(lease)
            try:
                yield lease
            finally:
                lease.end()
                self._leases.remove(lease)
                self._release(queue, entry)

    def holder(self, name: str) -> Holder | None:
        """Who holds `name`. Takes a few seconds if it is on another machine; writes nothing."""
        queue = LockQueue(self._store, f"holds/{name}")
        found = [who for entry in queue.read().waiting() if (who := queue.who(entry)) is not None]
        deadline = clock() + 2 * self.timing.heartbeat_s
        found_alive = {who.process: self._watch.alive(who) for who in found}
        while None in found_alive.values() and True not in found_alive.values() and clock() < deadline:
            time.sleep(min(0.5, self.timing.heartbeat_s / 4))
            found_alive = {who.process: self._watch.alive(who) for who in found}
        alive = next((who for who in found if found_alive[who.process]), None)
        if alive is not None:
            return Holder(alive, alive=True)
        return Holder(found[0], alive=False) if found else None

    def raise_unless_free(self, name: str, what: str) -> None:
        """Raises UserError if a living process holds `name`; the message names it and `what` it holds."""
        holder = self.holder(name)
        if holder is not None and holder.alive:
            raise _taken(holder.who, what, self._store.uri)

    def send_heartbeat(self) -> float:
        """Returns the time just before it, by this module's clock."""
        with self._lock:
            began = clock()
            self._count += 1
            self._store.put_bytes(heartbeat_name(self._me), b"%d" % self._count)
            self.last_heartbeat = began
            return began

    def _release(self, queue: LockQueue, entry: QueueEntry) -> None:
        try:
            queue.release(entry)
        except Exception as error:
            # It is released all the same: with the next heartbeat, or when this process ends.
            _log.warning("could not release %s yet: %s", queue.name, error)
        finally:
            self._note_unreleased(queue)

    def _note_unreleased(self, queue: LockQueue) -> None:
        if queue.unreleased and queue not in self._unreleased:
            self._unreleased.append(queue)

    def _retry_releases(self) -> None:
        """Release what could not be released before; what still cannot be is left for the next time."""
        for queue in list(self._unreleased):
            with contextlib.suppress(Exception):
                for entry in list(queue.unreleased):
                    queue.release(entry)
                self._unreleased.remove(queue)

    @contextlib.contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Send heartbeats while at least one hold is held or wanted."""
        if self._users == 0:
            try:
                self.send_heartbeat()
            except OSError as error:
                raise _unwritable(error, self._store.root) from None
            self._stop = threading.Event()
            threading.Thread(
                target=self._send_heartbeats, args=(self._stop,), name="holds", daemon=True
            ).start()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._stop.set()
                self._retry_releases()
                with contextlib.suppress(Exception):
                    self._watch.remove_stale()
                    self._remove_heartbeat()

    def _remove_heartbeat(self) -> None:
        """Remove the own heartbeat; under the lock, so that none under way comes after it."""
        with self._lock:
            self._store.delete(heartbeat_name(self._me))

    def _send_heartbeats(self, stop: threading.Event) -> None:
        failing = False
        while not stop.wait(self.timing.heartbeat_s):
            renewals: list[Callable[[], object]] = [lease.renew for lease in self._leases] or [
                self.send_heartbeat
            ]
            failed = False
            for renew in renewals:
                if stop.is_set():
                    return
                try:
                    renew()
                except Exception as error:
                    if not (failing or failed):
                        self._warn(error)
                    failed = True
            # Of several leases one may fail with every heartbeat, and the others not.
            failing = failed
            self._retry_releases()

    def _warn(self, error: Exception) -> None:
        root = self._store.root
        _log.warning(
            "no heartbeat has reached the store since %s: %s; retrying every %.0f s. After %.0f s the run ends, "
            "because another driver may take over then",
            time.strftime("%H:%M:%S"),
            disk.described(error, [root]) if disk.is_full(error) else error,
            self.timing.heartbeat_s,
            self.timing.timeout_s,
        )


def _unwritable(error: OSError, root: Path) -> UserError:
    if disk.is_full(error):
        return UserError(
            disk.described(error, [root]), where="store", hint="free some space on it; nothing was changed"
        )
    return UserError(f"cannot write to the store: {error}", where="store")


def _taken(who: ProcessIdentity, what: str, uri: str) -> UserError:
    hint = "wait for it, or stop it with Ctrl-C in its terminal"
    if is_suspended(who):
        hint = (
            f"it is suspended: resume it with `kill -CONT {who.pid}`, or end it with `kill -KILL {who.pid}`"
        )
    elif lives(who) is None:
        hint = f"wait for it, or stop it on {who.host}"
    return UserError(f"{what} is already being run by {who}", where=f"the store {redacted(uri)}", hint=hint)
