"""Lamport's bakery algorithm over a store's objects: of all who queue for a thing one at a time gets it.

From L. Lamport, "A New Solution of Dijkstra's Concurrent Programming Problem", CACM 17(8), 1974. It needs
whole-object put, get, delete and a list that shows what was put before it began: no rename, no conditional put,
no file locks, so any store will do. Who queues has up to two objects under the queue's name:

    <id>.door              put first, removed last but one: who the owner is. It chooses a number until it has put one
    <number>-<id>.ticket   put once the number is chosen, one above all that were seen
    <number>.epoch         left by the one that got the lock with that number, so that numbers never come again

The one with the lowest (number, id) is served. Listed objects are never rewritten: while an object is replaced,
some file systems' listings skip it. A number without a `.door` counts for nothing: its owner is releasing it, or was
taken for dead and had its entry removed, which it notices before it has the lock.
"""

from __future__ import annotations

import contextlib
import logging
import re
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import ValidationError

from orchestrator.fsio import NotAFileError
from orchestrator.pipeline.lease.process_identity import ProcessIdentity, owner_in
from orchestrator.storage.store import Store

_NAME = re.compile(
    r"(?P<owner>[0-9a-f]{32})\.door|(?P<number>[0-9]{1,15})-(?P<id>[0-9a-f]{32})\.ticket|(?P<epoch>[0-9]{1,15})\.epoch"
)
_log = logging.getLogger(__name__)


class LockTakenError(Exception):
    """Somebody who lives is ahead."""

    def __init__(self, who: ProcessIdentity) -> None:
        super().__init__(str(who))
        self.who = who


@dataclass(frozen=True)
class QueueEntry:
    """An entry in the queue; `number` is None while its owner is choosing one."""

    id: str
    number: int | None = None


class LivenessCheck(Protocol):
    """What the queue asks about others and tells about them."""

    def judge(self, who: ProcessIdentity) -> bool | None:
        """Whether it lives; None if that is open, then it is asked again."""

    def removed(self, who: ProcessIdentity, entry: QueueEntry) -> None:
        """A dead process's entry was removed."""

    def pause(self) -> None:
        """Wait a little."""


@dataclass
class QueueState:
    """What one listing of the queue shows."""

    present: set[str] = field(default_factory=set)
    numbers: dict[str, int] = field(default_factory=dict)
    epochs: set[int] = field(default_factory=set)

    def has(self, entry: QueueEntry) -> bool:
        """Whether nobody removed the entry."""
        return entry.id in self.present and entry.id in self.numbers

    def highest(self) -> int:
        """The highest number ever seen."""
        return max([*self.numbers.values(), *self.epochs], default=0)

    def waiting(self) -> list[QueueEntry]:
        """Who has a number, first come first."""
        entries = [QueueEntry(id, number) for id, number in self.numbers.items() if id in self.present]
        return sorted(entries, key=_order)

    def choosing(self) -> list[QueueEntry]:
        """Who is here without a number: it may turn out to be ahead of anybody."""
        return [QueueEntry(id) for id in sorted(self.present - self.numbers.keys())]


class LockQueue:
    """The queue for one thing.

    Args:
        store: holds it.
        name: the start of its objects' names; no other thing's is the same.
        fenced: keep epochs: the numbers of those who had the lock only rise.

    Attributes:
        unreleased: entries that were released while the store did not answer: they still block others.
    """

    def __init__(self, store: Store, name: str, *, fenced: bool = True) -> None:
        self._store = store
        self.name = name
        self._fenced = fenced
        self.unreleased: list[QueueEntry] = []

    def read(self) -> QueueState:
        """The queue now."""
        state = QueueState()
        start = f"{self.name}."
        for name in self._store.list(start):
            found = _NAME.fullmatch(name.removeprefix(start))
            if found is None:
                continue
            if found["owner"]:
                state.present.add(found["owner"])
            elif found["id"]:
                state.numbers[found["id"]] = int(found["number"])
            else:
                state.epochs.add(int(found["epoch"]))
        return state

    def who(self, entry: QueueEntry) -> ProcessIdentity | None:
        """Whose entry it is; None once it has gone, or if it cannot be read: then it counts as a dead process's.

        Raises:
            UserError: a later version of this program made it.
        """
        name = self.owner_name(entry)
        try:
            return owner_in(self._store.get_bytes(name), f"{name} in store {self._store.uri}")
        except FileNotFoundError:
            return None
        except (ValidationError, NotAFileError):
            _log.warning("%s has no valid owner and is treated as left behind by a dead process", name)
            return None

    def acquire(
        self,
        who: ProcessIdentity,
        liveness: LivenessCheck,
        *,
        above: int = 0,
    ) -> QueueEntry:
        """Wait for the lock; returns the entry that has it.

        Args:
            who: goes into the queue.
            liveness: tells the living from the dead.
            above: the number is to be higher than this too.

        Raises:
            LockTakenError: somebody who lives is ahead.
        """
        while True:
            entry = QueueEntry(uuid.uuid4().hex)
            try:
                entry = self._enqueue(entry, who, above)
                if self._is_served(entry, liveness):
                    return entry
            except BaseException:
                # The first error is the one to tell; an entry that stays behind is in `unreleased`.
                with contextlib.suppress(Exception):
                    self.release(entry)
                raise
            self.release(entry)

    def release(self, entry: QueueEntry) -> None:
        """Remove an entry, one's own or a dead process's. The owner's file first: from then on its number is void."""
        if entry not in self.unreleased:
            self.unreleased.append(entry)
        self._store.delete(self.owner_name(entry))
        if entry.number is not None:
            self._store.delete(self._number_name(entry))
        self.unreleased.remove(entry)

    def has(self, entry: QueueEntry) -> bool:
        """Whether nobody removed the entry; two look-ups."""
        return all(
            self._store.stat(name) is not None for name in (self.owner_name(entry), self._number_name(entry))
        )

    def owner_name(self, entry: QueueEntry) -> str:
        """The object that names the owner of an entry."""
        return f"{self.name}.{entry.id}.door"

    def _enqueue(self, entry: QueueEntry, who: ProcessIdentity, above: int) -> QueueEntry:
        data = who.model_dump_json().encode()
        self._store.put_bytes(self.owner_name(entry), data)
        numbered = QueueEntry(entry.id, 1 + max(above, self.read().highest()))
        self._store.put_bytes(self._number_name(numbered), data)
        return numbered

    def _is_served(
        self,
        entry: QueueEntry,
        liveness: LivenessCheck,
    ) -> bool:
        """Wait until nobody is ahead. False: start again, with another entry."""
        while True:
            state = self.read()
            if not state.has(entry):
                return False
            ahead = [other for other in state.waiting() if _order(other) < _order(entry)]
            waiting = [*ahead, *(other for other in state.choosing() if other.id != entry.id)]
            if waiting:
                if not self._remove_dead(waiting, liveness):
                    liveness.pause()
                continue
            if self._fenced and not self._claim(state, entry):
                return False
            self._tidy(state, entry)
            return True

    def _claim(self, state: QueueState, entry: QueueEntry) -> bool:
        """Put on record that the number was used."""
        if state.epochs and max(state.epochs) >= _number(entry):
            return False
        self._store.put_bytes(self._epoch(_number(entry)), b"")
        # Whoever was taken for dead meanwhile finds its entry removed now. And who removed it looked for epochs
        # later than that: either it saw this one and took a higher number, or this look comes too late to win.
        return self.has(entry)

    def _remove_dead(
        self,
        others: list[QueueEntry],
        liveness: LivenessCheck,
    ) -> bool:
        """Whether one is gone now. Raises LockTakenError if one that has a number lives."""
        changed = False
        for other in others:
            who = self.who(other)
            alive = liveness.judge(who) if who is not None else False
            if alive is False:
                self.release(other)
                changed = True
                if who is not None:
                    liveness.removed(who, other)
            elif alive and who is not None and other.number is not None:
                raise LockTakenError(who)
        return changed

    def _tidy(self, state: QueueState, entry: QueueEntry) -> None:
        """Remove void numbers and epochs below the served one's."""
        for id, number in state.numbers.items():
            if id not in state.present and number < _number(entry):
                self._store.delete(self._number_name(QueueEntry(id, number)))
        for number in state.epochs:
            if number < _number(entry):
                self._store.delete(self._epoch(number))

    def _number_name(self, entry: QueueEntry) -> str:
        return f"{self.name}.{_number(entry):08d}-{entry.id}.ticket"

    def _epoch(self, number: int) -> str:
        return f"{self.name}.{number:08d}.epoch"


def _number(entry: QueueEntry) -> int:
    assert entry.number is not None
    return entry.number


def _order(entry: QueueEntry) -> tuple[int, str]:
    return _number(entry), entry.id
