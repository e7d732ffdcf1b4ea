"""Lamport's bakery algorithm over a store's objects: of all who queue for a thing one at a time gets it.

From L. Lamport, "A New Solution of Dijkstra's Concurrent Programming Problem", CACM 17(8), 1974. It needs
whole-object put, get, delete and a list that shows what was put before it began: no rename, no conditional put,
no file locks, so any store will do. Who queues has up to two objects under the queue's name:

    <id>.door              put first, removed last but one: its owner is here, and chooses until it has a ticket
    <number>-<id>.ticket   put once the number is chosen, one above all that were seen
    <number>.epoch         left by whoever entered with that number, so that numbers never come again

The one with the lowest (number, id) is served. Listed objects are never rewritten: while an object is replaced,
some file systems' listings skip it. A ticket without a door counts for nothing: its owner is leaving, or was
taken for dead and had its place removed, which it notices before it enters.
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
from orchestrator.pipeline.process_identity import ProcessIdentity
from orchestrator.storage.local import Store

_NAME = re.compile(
    r"(?P<door>[0-9a-f]{32})\.door|(?P<number>[0-9]{1,15})-(?P<id>[0-9a-f]{32})\.ticket|(?P<epoch>[0-9]{1,15})\.epoch"
)
_log = logging.getLogger(__name__)


class LockTakenError(Exception):
    """Somebody who lives is ahead."""

    def __init__(self, who: ProcessIdentity) -> None:
        super().__init__(str(who))
        self.who = who


@dataclass(frozen=True)
class QueueEntry:
    """A place in the queue; `number` is None while its owner is choosing one."""

    id: str
    number: int | None = None


class LivenessCheck(Protocol):
    """What the queue asks about others and tells about them."""

    def judge(self, who: ProcessIdentity) -> bool | None:
        """Whether it lives; None if that is open, then it is asked again."""

    def removed(self, who: ProcessIdentity, place: QueueEntry) -> None:
        """A dead one's place was removed."""

    def pause(self) -> None:
        """Wait a little."""


@dataclass
class QueueState:
    """What one listing of the queue shows."""

    entered: set[str] = field(default_factory=set)
    tickets: dict[str, int] = field(default_factory=dict)
    epochs: set[int] = field(default_factory=set)

    def has(self, place: QueueEntry) -> bool:
        """Whether nobody removed the place."""
        return place.id in self.entered and place.id in self.tickets

    def highest(self) -> int:
        """The highest number ever seen."""
        return max([*self.tickets.values(), *self.epochs], default=0)

    def waiting(self) -> list[QueueEntry]:
        """Who has a ticket, first come first."""
        places = [QueueEntry(id, number) for id, number in self.tickets.items() if id in self.entered]
        return sorted(places, key=_order)

    def choosing(self) -> list[QueueEntry]:
        """Who is here without a ticket: it may turn out to be ahead of anybody."""
        return [QueueEntry(id) for id in sorted(self.entered - self.tickets.keys())]


class LockQueue:
    """The queue for one thing.

    Args:
        store: holds it.
        name: the start of its objects' names; no other thing's is the same.
        fenced: keep epochs: numbers of those who entered rise for ever.

    Attributes:
        not_given_up: places that were given up, while the store did not take that: they are still in the way.
    """

    def __init__(self, store: Store, name: str, *, fenced: bool = True) -> None:
        self._store = store
        self.name = name
        self._fenced = fenced
        self.not_given_up: list[QueueEntry] = []

    def read(self) -> QueueState:
        """The queue now."""
        view = QueueState()
        start = f"{self.name}."
        for name in self._store.list(start):
            found = _NAME.fullmatch(name.removeprefix(start))
            if found is None:
                continue
            if found["door"]:
                view.entered.add(found["door"])
            elif found["id"]:
                view.tickets[found["id"]] = int(found["number"])
            else:
                view.epochs.add(int(found["epoch"]))
        return view

    def who(self, place: QueueEntry) -> ProcessIdentity | None:
        """Whose place it is; None once it has gone, or if nobody can tell: then it counts as a dead one's."""
        name = self.door(place)
        try:
            return ProcessIdentity.model_validate_json(self._store.get_bytes(name))
        except FileNotFoundError:
            return None
        except (ValidationError, NotAFileError):
            _log.warning("%s has no valid owner and is treated as left behind by a dead process", name)
            return None

    def enter(
        self,
        who: ProcessIdentity,
        liveness: LivenessCheck,
        *,
        above: int = 0,
    ) -> QueueEntry:
        """Queue up and come back with the place that is served, or not at all.

        Args:
            who: goes into the queue.
            liveness: tells the living from the dead.
            above: the number is to be higher than this too.

        Raises:
            LockTakenError: somebody who lives is ahead.
        """
        while True:
            place = QueueEntry(uuid.uuid4().hex)
            try:
                place = self._take_ticket(place, who, above)
                if self._is_served(place, liveness):
                    return place
            except BaseException:
                # The first error is the one to tell; a place that stays behind is in `not_given_up`.
                with contextlib.suppress(Exception):
                    self.leave(place)
                raise
            self.leave(place)

    def leave(self, place: QueueEntry) -> None:
        """Give the place up, or remove a dead one's. The door first: from then on the ticket is void."""
        if place not in self.not_given_up:
            self.not_given_up.append(place)
        self._store.delete(self.door(place))
        if place.number is not None:
            self._store.delete(self._ticket(place))
        self.not_given_up.remove(place)

    def has(self, place: QueueEntry) -> bool:
        """Whether nobody removed the place; two look-ups."""
        return all(self._store.stat(name) is not None for name in (self.door(place), self._ticket(place)))

    def door(self, place: QueueEntry) -> str:
        """The object that says who has the place."""
        return f"{self.name}.{place.id}.door"

    def _take_ticket(self, place: QueueEntry, who: ProcessIdentity, above: int) -> QueueEntry:
        said = who.model_dump_json().encode()
        self._store.put_bytes(self.door(place), said)
        numbered = QueueEntry(place.id, 1 + max(above, self.read().highest()))
        self._store.put_bytes(self._ticket(numbered), said)
        return numbered

    def _is_served(
        self,
        place: QueueEntry,
        liveness: LivenessCheck,
    ) -> bool:
        """Wait until nobody is ahead. False: start again, with another place."""
        while True:
            view = self.read()
            if not view.has(place):
                return False
            ahead = [other for other in view.waiting() if _order(other) < _order(place)]
            waiting = [*ahead, *(other for other in view.choosing() if other.id != place.id)]
            if waiting:
                if not self._remove_dead(waiting, liveness):
                    liveness.pause()
                continue
            if self._fenced and not self._claim(view, place):
                return False
            self._tidy(view, place)
            return True

    def _claim(self, view: QueueState, place: QueueEntry) -> bool:
        """Put on record that the number was used."""
        if view.epochs and max(view.epochs) >= _number(place):
            return False
        self._store.put_bytes(self._epoch(_number(place)), b"")
        # Whoever was taken for dead meanwhile finds its place removed now. And who removed it looked for epochs
        # later than that: either it saw this one and took a higher number, or this look comes too late to enter.
        return self.has(place)

    def _remove_dead(
        self,
        others: list[QueueEntry],
        liveness: LivenessCheck,
    ) -> bool:
        """Whether one is gone now. Raises LockTakenError if one that has a ticket lives."""
        changed = False
        for other in others:
            who = self.who(other)
            verdict = liveness.judge(who) if who is not None else False
            if verdict is False:
                self.leave(other)
                changed = True
                if who is not None:
                    liveness.removed(who, other)
            elif verdict and who is not None and other.number is not None:
                raise LockTakenError(who)
        return changed

    def _tidy(self, view: QueueState, place: QueueEntry) -> None:
        """Remove void tickets and epochs below the served one's."""
        for id, number in view.tickets.items():
            if id not in view.entered and number < _number(place):
                self._store.delete(self._ticket(QueueEntry(id, number)))
        for number in view.epochs:
            if number < _number(place):
                self._store.delete(self._epoch(number))

    def _ticket(self, place: QueueEntry) -> str:
        return f"{self.name}.{_number(place):08d}-{place.id}.ticket"

    def _epoch(self, number: int) -> str:
        return f"{self.name}.{number:08d}.epoch"


def _number(place: QueueEntry) -> int:
    assert place.number is not None
    return place.number


def _order(place: QueueEntry) -> tuple[int, str]:
    return _number(place), place.id
