"""The queue under every interleaving hypothesis can think of: never two at once, and never nobody."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduled import Actor, MemoryStore

from orchestrator.pipeline.lease import lock_queue as bakery_module
from orchestrator.pipeline.lease.lock_queue import LockQueue, LockTakenError, QueueEntry
from orchestrator.pipeline.lease.process_identity import ProcessIdentity
from orchestrator.pipeline.store import ledger as ledger_module
from orchestrator.pipeline.store.ledger import Ledger

NAME = "holds/thing"


@pytest.fixture(scope="module", autouse=True)
def repeatable() -> Iterator[None]:
    """One thing at a time, and ids that hypothesis can draw again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "_READERS", 1)
        patch.setattr(bakery_module, "uuid", SimpleNamespace(uuid4=_drawn_id))
        yield


def _drawn_id() -> uuid.UUID:
    return uuid.UUID(int=random.getrandbits(128))


def who(name: str) -> ProcessIdentity:
    return ProcessIdentity(process=name, host=name, pid=1, machine=None, started=None, since=0.0)


class Fence:
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def check(self) -> None:
        pass


class World:
    """Some contenders for one thing, each trying so many times, and what became of it."""

    def __init__(self, contenders: int, tries: int = 1, *, fenced: bool = True) -> None:
        self.fenced = fenced
        self.objects: dict[str, bytes] = {}
        self.actors = {name: Actor(name, self.objects) for name in "abc"[:contenders]}
        self.slept: set[str] = set()
        self.inside: dict[str, QueueEntry] = {}
        self.acquired: list[tuple[str, int]] = []
        self.refused = 0
        for name, actor in self.actors.items():
            actor.begin(lambda name=name: self._contend(name, tries))  # type: ignore[misc]

    def _contend(self, name: str, tries: int) -> None:
        actor = self.actors[name]
        queue = LockQueue(actor.store, NAME, fenced=self.fenced)
        for _ in range(tries):
            try:
                entry = queue.acquire(who(name), _Liveness(self, actor))
            except LockTakenError:
                self.refused += 1
                continue
            self.inside[name] = entry
            assert entry.number is not None
            self.acquired.append((name, entry.number))
            for _ in range(6):
                actor.turn()
            if self.fenced:
                ledger = Ledger(actor.store, "toy", Fence(entry.number))
                for _ in range(2):
                    ledger.append("opened", run_id=f"{name}{entry.number}")
            del self.inside[name]
            queue.release(entry)

    def holders(self) -> list[str]:
        """Who is inside and was not taken for dead."""
        state = LockQueue(MemoryStore(self.objects), NAME).read()
        return [name for name, entry in self.inside.items() if state.has(entry)]

    def run(self, schedule: Sequence[int], crashes: dict[int, int] | None = None) -> None:
        """Follow the schedule, then give everybody its turn until all are through."""
        turns = iter(schedule)
        for count in range(20_000):
            running = [actor for actor in self.actors.values() if actor.running]
            if not running:
                break
            chosen = running[next(turns, count) % len(running)]
            if crashes and crashes.get(count) is not None:
                victim = running[crashes[count] % len(running)]
                victim.crash()
                self.inside.pop(victim.name, None)
            elif chosen.name not in self.slept or len(running) == len(self.slept):
                chosen.step()
            assert len(self.holders()) <= 1, self.holders()
        else:
            pytest.fail("it never ended")
        for actor in self.actors.values():
            assert actor.error is None, actor.error


class _Liveness:
    def __init__(self, world: World, actor: Actor) -> None:
        self._world = world
        self._actor = actor

    def judge(self, other: ProcessIdentity) -> bool | None:
        if self._world.actors[other.process].crashed:
            return False
        return other.process not in self._world.slept

    def removed(self, other: ProcessIdentity, entry: QueueEntry) -> None:
        pass

    def pause(self) -> None:
        self._actor.turn()


# Who goes next, and how far: races show when one does many steps between two of another's.
SCHEDULE = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 12)), max_size=20).map(
    lambda runs: [who for who, steps in runs for _ in range(steps)]
)


@settings(max_examples=200, deadline=None)
@given(schedule=SCHEDULE, contenders=st.integers(2, 3), tries=st.integers(1, 2), fenced=st.booleans())
def test_one_of_those_that_race_gets_in(
    schedule: list[int], contenders: int, tries: int, fenced: bool
) -> None:
    world = World(contenders, tries, fenced=fenced)
    world.run(schedule)
    assert world.acquired
    assert len(world.acquired) + world.refused == contenders * tries
    numbers = [number for _, number in world.acquired]
    left = [name for name in world.objects if name.startswith("holds/")]
    if fenced:
        assert numbers == sorted(set(numbers)), "numbers rise"
        assert left == [f"{NAME}.{numbers[-1]:08d}.epoch"]
    else:
        assert left == []


@settings(max_examples=200, deadline=None)
@given(
    schedule=SCHEDULE,
    crashes=st.dictionaries(st.integers(0, 60), st.integers(0, 2), max_size=2),
    fenced=st.booleans(),
)
def test_whoever_dies_wherever_it_stands_is_replaced(
    schedule: list[int], crashes: dict[int, int], fenced: bool
) -> None:
    world = World(3, fenced=fenced)
    world.run(schedule, crashes)
    numbers = [number for _, number in world.acquired]
    assert not fenced or numbers == sorted(set(numbers))
    last = Actor("d", world.objects)
    world.actors = {**world.actors, "d": last}
    last.begin(lambda: world._contend("d", 1))
    world.run([])
    assert world.acquired[-1][0] == "d", "a crash leaves nothing that keeps others out"


@settings(max_examples=250, deadline=None)
@given(
    schedule=SCHEDULE,
    asleep=st.sampled_from("abc"),
    first=st.integers(0, 40),
    length=st.integers(1, 60),
)
def test_a_sleeper_that_was_taken_for_dead_does_no_harm(
    schedule: list[int], asleep: str, first: int, length: int
) -> None:
    world = World(3, tries=2)
    turns = iter(schedule)
    for count in range(20_000):
        running = [actor for actor in world.actors.values() if actor.running]
        if not running:
            break
        is_night = first <= count < first + length and len(running) > 1
        world.slept = {asleep} if is_night else set()
        awake = [actor for actor in running if actor.name not in world.slept]
        awake[next(turns, count) % len(awake)].step()
        assert len(world.holders()) <= 1, world.holders()
    else:
        pytest.fail("it never ended")
    for actor in world.actors.values():
        assert actor.error is None, actor.error
    numbers = [number for _, number in world.acquired]
    assert len(set(numbers)) == len(numbers), "no two holders have one number"
    _assert_ledger_has_no_stale_events(world)


def _assert_ledger_has_no_stale_events(world: World) -> None:
    """What counts was written by one holder after another, in the order in which they took over."""
    ledger = Ledger(MemoryStore(world.objects), "toy")
    owners = [event.run_id for event in ledger_module._effective(ledger._events)]
    runs = [owner for owner, before in zip(owners, [None, *owners], strict=False) if owner != before]
    assert len(runs) == len(set(runs)), f"two writers' events are mixed: {owners}"
    epochs = [int(str(run)[1:]) for run in runs]
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("name", ["9" * 18 + ".epoch", "9" * 16 + f"-{'a' * 32}.ticket"])
def test_a_number_that_nobody_reaches_is_not_counted_on(name: str) -> None:
    """Numbers rise for ever; one of 18 digits would leave none for those who come."""
    objects = {f"{NAME}.{name}": b""}
    queue = LockQueue(MemoryStore(objects), NAME)
    assert queue.read().highest() == 0
