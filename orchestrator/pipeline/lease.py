"""Exclusive holds on names in a store, with any number of machines: leases that a live process keeps renewing.

Who may hold is settled by the queue of :mod:`orchestrator.pipeline.lock_queue`; this module tells the living from the
dead. A process that holds or wants something rewrites one small object, its beat, every few seconds. No two
machines' clocks are compared: a contender watches by its own clock whether the beat changes. Once it has not for
`timeout_s` and one beat more, the holder's place is removed. On one machine the kernel is asked instead: a process
that is gone is replaced at once, and one that is there never is.

A holder that could not renew for `timeout_s`, or finds its place removed, has lost its hold. What it was about to
write when it fell silent may still arrive: the ledger orders that out by the hold's `epoch`.
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
from orchestrator.errors import UserError
from orchestrator.pipeline.liveness import Contender, HeartbeatMonitor, Timing, clock, heartbeat_name
from orchestrator.pipeline.lock_queue import LockQueue, LockTakenError, QueueEntry
from orchestrator.pipeline.process_identity import ProcessIdentity, is_suspended, lives, this_process
from orchestrator.storage.local import Store

_log = logging.getLogger(__name__)


class LeaseLostError(Exception):
    """The hold on a name was lost: another process may have it by now, so nothing more may be written."""


@dataclass(frozen=True)
class Holder:
    """Who holds a name, and whether it gave a sign of life."""

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
        self, leases: LeaseManager, queue: LockQueue, place: QueueEntry, what: str, notes: list[str]
    ) -> None:
        assert place.number is not None
        self.epoch = place.number
        self.notes = notes
        self.lost: str | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._leases = leases
        self._queue = queue
        self._place = place
        self._what = what
        self._lock = threading.RLock()
        self._ended = False
        self._confirmed = leases.beaten

    def check(self) -> None:
        """Renew the hold: from now on nobody takes it for `timeout_s`.

        Raises:
            LeaseLostError: it is lost.
        """
        with self._lock:
            self.renew()
            if self._silent() >= self._leases.timing.timeout_s:
                # The process slept, or the store took its time, in the middle of that.
                self.renew()
            if self.lost is None and self._silent() >= self._leases.timing.timeout_s:
                self._lose("the store is too slow to renew it in time")
            self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises LeaseLostError if the hold is known to be lost; asks nobody."""
        if self.lost is not None:
            raise LeaseLostError(f"lost the lock on {self._what}: {self.lost}")

    def renew(self) -> None:
        """Beat, and look whether the place in the queue is still there. Errors of the store pass through."""
        timing = self._leases.timing
        with self._lock:
            if self.lost is not None or self._ended:
                return
            silent = self._silent()
            try:
                began = self._leases.beat()
                if silent >= timing.timeout_s:
                    # This process slept. Whoever took it for dead just before this beat is removing its place:
                    # give that the time it needs to be seen.
                    time.sleep(timing.heartbeat_s)
                there = self._queue.has(self._place)
            except Exception:
                if self._silent() >= timing.timeout_s:
                    self._lose(f"the store could not be reached for {self._silent():.0f} s")
                raise
            if there:
                self._confirmed = began
            else:
                slept = f"after {silent:.0f} s without a heartbeat " if silent >= timing.timeout_s else ""
                self._lose(f"{slept}its entry in the store was removed, and another process may hold it now")

    def end(self) -> None:
        """It is about to be given up: the beat that is under way must not take that for a loss."""
        with self._lock:
            self._ended = True

    def _silent(self) -> float:
        return clock() - self._confirmed

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
        self.beaten = 0.0
        self._store = store
        self._me = me or this_process()
        self._watch = HeartbeatMonitor(store, self.timing)
        self._leases: list[Lease] = []
        # Queues with places that were given up and are still there.
        self._not_given_up: list[LockQueue] = []
        self._count = 0
        self._lock = threading.Lock()
        self._users = 0
        self._stop = threading.Event()

    @contextlib.contextmanager
    def hold(
        self,
        name: str,
        what: str,
        *,
        above: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Iterator[Lease]:
        """Hold `name` for this process alone.

        Args:
            name: letters, digits, dots and dashes.
            what: what is being held, for messages.
            above: number the holders, from above this: the lease's `epoch` tells a later one from an earlier one.
            say: tells the user why it takes long, and of a dead holder that was replaced.

        Raises:
            UserError: a living process holds it; the message names it and says since when.
        """
        queue = LockQueue(self._store, f"holds/{name}", fenced=above is not None)
        with self._beating():
            self._leave_again()
            newcomer = Contender(self._watch, self.timing, what, say or _log.warning)
            try:
                place = queue.enter(self._me, newcomer, above=above or 0)
            except LockTakenError as error:
                raise _taken(error.who, what, queue.name) from None
            except OSError as error:
                raise _unwritable(error, self._store.root) from None
            finally:
                self._note_not_given_up(queue)
            with contextlib.suppress(OSError):  # at the latest the next one does it
                self._watch.remove_stale()
            lease = Lease(self, queue, place, what, newcomer.notes)
            self._leases.append(lease)
            try:
                yield lease
            finally:
                lease.end()
                self._leases.remove(lease)
                self._leave(queue, place)

    def holder(self, name: str) -> Holder | None:
        """Who holds `name`. Takes a few seconds if it is on another machine; writes nothing."""
        queue = LockQueue(self._store, f"holds/{name}")
        found = [who for place in queue.read().waiting() if (who := queue.who(place)) is not None]
        deadline = clock() + 2 * self.timing.heartbeat_s
        signs = {who.process: self._watch.alive(who) for who in found}
        while None in signs.values() and True not in signs.values() and clock() < deadline:
            time.sleep(min(0.5, self.timing.heartbeat_s / 4))
            signs = {who.process: self._watch.alive(who) for who in found}
        alive = next((who for who in found if signs[who.process]), None)
        if alive is not None:
            return Holder(alive, alive=True)
        return Holder(found[0], alive=False) if found else None

    def raise_unless_free(self, name: str, what: str) -> None:
        """Raises UserError if a living process holds `name`; the message names it and `what` it holds."""
        holder = self.holder(name)
        if holder is not None and holder.alive:
            raise _taken(holder.who, what, f"holds/{name}")

    def beat(self) -> float:
        """Give a sign of life; returns the time just before it, by this module's clock."""
        with self._lock:
            began = clock()
            self._count += 1
            self._store.put_bytes(heartbeat_name(self._me), b"%d" % self._count)
            self.beaten = began
            return began

    def _leave(self, queue: LockQueue, place: QueueEntry) -> None:
        try:
            queue.leave(place)
        except Exception as error:
            # It is given up all the same: with the next beat, or when this process ends.
            _log.warning("could not release %s yet: %s", queue.name, error)
        finally:
            self._note_not_given_up(queue)

    def _note_not_given_up(self, queue: LockQueue) -> None:
        if queue.not_given_up and queue not in self._not_given_up:
            self._not_given_up.append(queue)

    def _leave_again(self) -> None:
        """Give up what the store did not let go of before; what it still does not is left for the next time."""
        for queue in list(self._not_given_up):
            with contextlib.suppress(Exception):
                for place in list(queue.not_given_up):
                    queue.leave(place)
                self._not_given_up.remove(queue)

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """While at least one hold is held or wanted, beat."""
        if self._users == 0:
            try:
                self.beat()
            except OSError as error:
                raise _unwritable(error, self._store.root) from None
            self._stop = threading.Event()
            threading.Thread(target=self._keep_beating, args=(self._stop,), name="holds", daemon=True).start()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._stop.set()
                self._leave_again()
                with contextlib.suppress(Exception):
                    self._watch.remove_stale()
                    self._silence()

    def _silence(self) -> None:
        """Remove the own beat; under the lock, so that none under way comes after it."""
        with self._lock:
            self._store.delete(heartbeat_name(self._me))

    def _keep_beating(self, stop: threading.Event) -> None:
        failing = False
        while not stop.wait(self.timing.heartbeat_s):
            renewals: list[Callable[[], object]] = [lease.renew for lease in self._leases] or [self.beat]
            failed = False
            for renew in renewals:
                if stop.is_set():
                    return
                try:
                    renew()
                except Exception as error:
                    if not (failing or failed):
                        self._complain(error)
                    failed = True
            # Of several leases one may fail with every beat, and the others not.
            failing = failed
            self._leave_again()

    def _complain(self, error: Exception) -> None:
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


def _taken(who: ProcessIdentity, what: str, where: str) -> UserError:
    hint = "wait for it, or stop it with Ctrl-C in its terminal"
    if is_suspended(who):
        hint = (
            f"it is suspended: resume it with `kill -CONT {who.pid}`, or end it with `kill -KILL {who.pid}`"
        )
    elif lives(who) is None:
        hint = f"wait for it, or stop it on {who.host}"
    return UserError(f"{what} is already being run by {who}", where=where, hint=hint)
