"""Holds between real processes: that race, die, are suspended, or lose sight of the store.

A holder "elsewhere" is a process whose machine the others do not know: they have only its heartbeats.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError
from rich.console import Console
from scheduled import MemoryStore

from orchestrator.errors import UserError
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.lease import liveness, process_identity
from orchestrator.pipeline.lease.lease_manager import LeaseLostError, LeaseManager
from orchestrator.pipeline.lease.liveness import HeartbeatMonitor, Timing
from orchestrator.pipeline.lease.process_identity import ProcessIdentity, is_suspended, lives, this_process
from orchestrator.storage.local import LocalStore

FORK = multiprocessing.get_context("fork")
QUICK = Timing(heartbeat_s=0.2, timeout_s=1.5)
# Whoever waits for this to pass does not pass the test.
NEVER = Timing(heartbeat_s=0.2, timeout_s=10_000.0)


def leases(root: Path, timing: Timing, *, elsewhere: bool = False) -> LeaseManager:
    me = this_process()
    return LeaseManager(
        LocalStore(root), timing, me.model_copy(update={"machine": "elsewhere"}) if elsewhere else me
    )


def hold_until_told(
    root: Path, timing: Timing, elsewhere: bool, names: tuple[str, ...], pipe: Connection
) -> None:
    """Say `held` or why not; on `check` say how that went; end when told so."""
    own = leases(root, timing, elsewhere=elsewhere)
    try:
        with contextlib.ExitStack() as stack:
            pipe.recv()
            held = [stack.enter_context(own.hold(name, f"thing {name}", above=0)) for name in names]
            pipe.send("held")
            while pipe.recv() == "check":
                held[0].check()
                pipe.send("fine")
    except (UserError, LeaseLostError) as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Child:
    """A process that wants to hold things."""

    def __init__(
        self, root: Path, timing: Timing, names: tuple[str, ...] = ("it",), *, elsewhere: bool
    ) -> None:
        self.pipe, theirs = FORK.Pipe()
        arguments = (root, timing, elsewhere, names, theirs)
        self.process = FORK.Process(target=hold_until_told, args=arguments, daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ask(self, what: str) -> str:
        self.pipe.send(what)
        return self.answer()

    def answer(self) -> str:
        assert self.pipe.poll(30), "no answer"
        return str(self.pipe.recv())

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(
        timing: Timing, names: tuple[str, ...] = ("it",), *, elsewhere: bool = False, go: bool = True
    ) -> Child:
        children.append(Child(tmp_path, timing, names, elsewhere=elsewhere))
        if go:
            assert children[-1].ask("go") == "held"
        return children[-1]

    yield start
    for one in children:
        one.kill()


@pytest.mark.heavy
@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_ten_that_race_one_gets_it(child: Callable[..., Child], elsewhere: bool) -> None:
    racers = [child(Timing(0.3, 10_000.0), elsewhere=elsewhere, go=False) for _ in range(10)]
    for racer in racers:
        racer.pipe.send("go")
    said = [racer.answer() for racer in racers]
    assert said.count("held") == 1, said
    refused = [text for text in said if text != "held"]
    assert all("thing it is already being run by process " in text for text in refused), refused
    winner = racers[said.index("held")]
    assert any(f"process {winner.pid} on " in text for text in refused)
    assert winner.ask("check") == "fine"


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_living_holder_is_named_and_stays(
    tmp_path: Path, child: Callable[..., Child], elsewhere: bool
) -> None:
    holder = child(NEVER, elsewhere=elsewhere)
    with pytest.raises(UserError) as caught, leases(tmp_path, NEVER).hold("it", "thing it"):
        pass
    assert f"process {holder.pid} on " in caught.value.what
    assert " since 20" in caught.value.what
    assert caught.value.hint is not None
    seen = leases(tmp_path, NEVER).holder("it")
    assert seen is not None
    assert (seen.who.pid, seen.alive) == (holder.pid, True)
    assert holder.ask("check") == "fine"
    with leases(tmp_path, NEVER).hold("another", "another thing"):
        pass


def test_on_one_machine_a_killed_holder_is_replaced_at_once(
    tmp_path: Path, child: Callable[..., Child]
) -> None:
    holder = child(NEVER)
    holder.kill()
    seen = leases(tmp_path, NEVER).holder("it")
    assert seen is not None
    assert not seen.alive
    said: list[str] = []
    with leases(tmp_path, NEVER).hold("it", "thing it", above=0, notify=said.append) as lease:
        assert lease.epoch == 2
        assert said == lease.notes
        assert f"taken over from process {holder.pid} on " in said[0]
        assert "which is gone" in said[0]
    left = sorted(path.name for path in (tmp_path / "holds").iterdir())
    assert left == ["it.00000002.epoch"]


@pytest.mark.heavy
def test_a_silent_holder_elsewhere_is_replaced_after_the_lapse(
    tmp_path: Path, child: Callable[..., Child]
) -> None:
    holder = child(QUICK, ("it", "its"), elsewhere=True)
    holder.kill()
    own = leases(tmp_path, QUICK)
    said: list[Any] = []
    seen = own.holder("it")
    assert seen is not None
    assert not seen.alive
    began = time.monotonic()
    with leases(tmp_path, QUICK).hold("it", "thing it", above=0, notify=said.append):
        assert time.monotonic() - began >= QUICK.timeout_s
    assert "sends no heartbeat" in said[0]
    assert "without a heartbeat for " in said[1]
    # The other thing it held needs no second wait by one who saw it silent for so long.
    waited = leases(tmp_path, QUICK)
    with waited.hold("it", "thing it"), pytest.MonkeyPatch.context() as patch:
        who = holder_of(tmp_path, "its")
        while waited._watch.alive(who) is None:
            time.sleep(0.1)
        patch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited again"))
        with waited.hold("its", "thing its"):
            pass


def holder_of(root: Path, name: str) -> ProcessIdentity:
    owner_name = next((root / "holds").glob(f"{name}.*.door"))
    return ProcessIdentity.model_validate_json(owner_name.read_bytes())


@pytest.mark.heavy
def test_a_suspended_holder_that_was_replaced_learns_it(tmp_path: Path, child: Callable[..., Child]) -> None:
    holder = child(QUICK, elsewhere=True)
    os.kill(holder.pid, signal.SIGSTOP)
    with leases(tmp_path, QUICK).hold("it", "thing it", above=0) as lease:
        os.kill(holder.pid, signal.SIGCONT)
        said = holder.ask("check")
        assert said.startswith("LeaseLostError: lost the lock on thing it: ")
        assert "another process may hold it now" in said
        holder.process.join(10)
        lease.check()
    with leases(tmp_path, QUICK).hold("it", "thing it", above=0) as lease:
        assert lease.epoch == 3


@pytest.mark.heavy
def test_a_suspended_holder_that_nobody_replaced_goes_on(child: Callable[..., Child]) -> None:
    holder = child(QUICK, elsewhere=True)
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(2 * QUICK.timeout_s)
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.ask("check") == "fine"


def test_a_suspended_holder_on_this_machine_is_told_apart(
    tmp_path: Path, child: Callable[..., Child]
) -> None:
    holder = child(QUICK)
    os.kill(holder.pid, signal.SIGSTOP)
    until = time.monotonic() + 30
    while psutil.Process(holder.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < until:
        time.sleep(0.01)  # all its threads have to stop
    with pytest.raises(UserError) as caught, leases(tmp_path, QUICK).hold("it", "thing it"):
        pass
    assert f"kill -CONT {holder.pid}" in str(caught.value.hint)
    os.kill(holder.pid, signal.SIGCONT)
    assert holder.ask("check") == "fine"


class Away(LocalStore):
    """A store that can be out of reach."""

    away = False
    error = OSError("no route to host")

    def put_bytes(self, name: str, data: bytes) -> None:
        if self.away:
            raise self.error
        super().put_bytes(name, data)


def test_a_store_that_is_away_for_less_than_the_lapse_costs_nothing(tmp_path: Path) -> None:
    store = Away(tmp_path)
    with LeaseManager(store, Timing(0.1, 5.0)).hold("it", "thing it") as lease:
        store.away = True
        time.sleep(1.0)
        store.away = False
        lease.check()


def test_a_store_that_stays_away_ends_the_hold(tmp_path: Path) -> None:
    store, lost = Away(tmp_path), threading.Event()
    with LeaseManager(store, Timing(0.1, 1.0)).hold("it", "thing it") as lease:
        lease.on_lost = lost.set
        store.away = True
        assert lost.wait(20)
        store.away = False
        with pytest.raises(LeaseLostError, match="the store could not be reached for"):
            lease.check()


@pytest.mark.parametrize(
    ("error", "cause", "hint"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "disk",
            "free some space on it and run the same command",
        ),
        (OSError("no route to host"), "no route to host", "check the store, then run the same command"),
    ],
)
def test_why_a_hold_was_lost_and_what_to_do_are_said(
    tmp_path: Path, error: OSError, cause: str, hint: str
) -> None:
    store, lost, out = Away(tmp_path), threading.Event(), io.StringIO()
    store.error = error
    with LeaseManager(store, Timing(0.1, 1.0)).hold("it", "thing it") as lease:
        lease.on_lost = lost.set
        store.away = True
        assert lost.wait(20)
        store.away = False
        with pytest.raises(LeaseLostError, match=cause) as caught:
            lease.check()
    Reporter(Console(file=out, width=200)).lost(str(caught.value), caught.value.hint)
    (said, shown) = out.getvalue().splitlines()
    assert cause in said
    assert said.endswith("Nothing more was written.")
    assert shown.startswith(f"  hint {hint}")


def test_of_two_holds_one_that_cannot_be_renewed_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[str] = []

    def refused() -> None:
        tries.append("again")
        raise OSError("no route to host")

    one = leases(tmp_path, Timing(0.05, 10_000.0))
    with one.hold("it", "thing it") as lease, one.hold("its", "thing its"):
        monkeypatch.setattr(lease, "renew", refused)
        deadline = time.monotonic() + 10
        while len(tries) < 5 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(tries) >= 5
    said = [record.message for record in caplog.records if "no heartbeat has reached" in record.message]
    assert len(said) == 1
    assert "no route to host" in said[0]


def test_a_place_that_was_removed_is_noticed_without_asking(tmp_path: Path) -> None:
    lost = threading.Event()
    with leases(tmp_path, Timing(0.1, 20.0)).hold("it", "thing it") as lease:
        lease.on_lost = lost.set
        next((tmp_path / "holds").glob("it.*.ticket")).unlink()
        assert lost.wait(20)


def test_a_beat_that_comes_too_late_does_not_take_an_end_for_a_loss(tmp_path: Path) -> None:
    told: list[bool] = []
    with leases(tmp_path, NEVER).hold("it", "the thing") as lease:
        lease.on_lost = lambda: told.append(True)
    # As the thread that beats does when it took up its list of leases just before.
    lease.renew()
    assert lease.lost is None
    assert not told


def test_a_wiped_folder_of_holds_does_not_bring_old_numbers_back(tmp_path: Path) -> None:
    with leases(tmp_path, NEVER).hold("it", "thing it", above=7) as lease:
        assert lease.epoch == 8


def test_a_store_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    store = Away(tmp_path)
    store.away = True
    with (
        pytest.raises(UserError, match="cannot write to the store: no route"),
        LeaseManager(store).hold("it", "it"),
    ):
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_silence_that_was_watched_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    objects: dict[Any, Any] = {}
    monkeypatch.setattr(liveness, "clock", clock)
    who = this_process().model_copy(update={"machine": None})
    watch = HeartbeatMonitor(MemoryStore(objects), Timing(3.0, 20.0))

    def read(at: float, heartbeat: bytes) -> bool | None:
        clock.now, objects[liveness.heartbeat_name(who)] = at, heartbeat
        return watch.alive(who)

    assert read(0.0, b"1") is None
    assert read(3.0, b"2") is True
    assert read(25.9, b"2") is None, (
        "silent for less than a timeout and a heartbeat since it was seen to change"
    )
    assert read(26.0, b"2") is False
    assert read(26.1, b"3") is True, "it was only suspended"
    assert read(1000.0, b"4") is None, "that it lived at some time since the last look says little"
    assert read(1001.0, b"5") is True


def test_a_watcher_that_sleeps_itself_takes_nobody_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, objects = Clock(), {}
    monkeypatch.setattr(liveness, "clock", clock)
    who = this_process().model_copy(update={"machine": None})
    objects[liveness.heartbeat_name(who)] = b"1"
    nap = 0.0

    def turn() -> None:
        clock.now += nap

    watch = HeartbeatMonitor(MemoryStore(objects, turn), Timing(3.0, 20.0))
    assert watch.alive(who) is None
    nap = 100.0
    assert watch.alive(who) is None, "the beat was read before the nap: it may be out of date"
    nap = 0.0
    objects[liveness.heartbeat_name(who)] = b"30"
    assert watch.alive(who) is None
    objects[liveness.heartbeat_name(who)] = b"31"
    assert watch.alive(who) is True


def test_who_lives() -> None:
    me = this_process()
    assert lives(me) is True
    assert not is_suspended(me)
    assert lives(me.model_copy(update={"machine": "elsewhere"})) is None
    assert lives(me.model_copy(update={"machine": None})) is None
    assert me.started is not None
    assert lives(me.model_copy(update={"started": me.started - 1})) is False, "the number was given out again"
    sleeper = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    stat = process_identity._stat(sleeper.pid)
    assert stat is not None
    who = me.model_copy(update={"pid": sleeper.pid, "started": stat[1]})
    assert lives(who) is True
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert lives(who) is False, "a zombie does nothing any more"
    sleeper.communicate()
    assert lives(who) is False


@pytest.mark.parametrize("text", [b"", b"garbage", b"\xff\x00", b"[]", b'{"process": "x"}'])
def test_garbage_in_a_door_counts_as_a_dead_holders(
    tmp_path: Path, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = LocalStore(tmp_path)
    for suffix in ("door", "00000007.ticket"):
        number, _, kind = suffix.rpartition(".")
        stem = f"{number}-{'a' * 32}" if number else "a" * 32
        store.put_bytes(f"holds/thing.{stem}.{kind}", text)
    assert leases(tmp_path, NEVER).holder("thing") is None
    with leases(tmp_path, NEVER).hold("thing", "the thing", above=0) as lease:
        lease.check()
        assert lease.epoch > 7
    assert "holds/thing." + "a" * 32 in caplog.text
    assert not [name for name in store.list("holds/") if "a" * 32 in name]


@pytest.mark.parametrize(
    "field",
    [{"pid": 10**21}, {"pid": 0}, {"pid": -1}, {"since": 1e30}, {"since": "nan"}, {"process": "../x"}],
)
def test_an_owner_that_cannot_be_is_none(field: dict[str, Any]) -> None:
    known = json.loads(this_process().model_dump_json())
    assert ProcessIdentity.model_validate(known) is not None
    with pytest.raises(ValidationError):
        ProcessIdentity.model_validate({**known, **field})


@pytest.mark.parametrize(
    "extra",
    [{}, {"pid": "many"}, *({"format": one} for one in ("v2", "2.1", 2.1, "1", 0, -1, None, True, [2]))],
    ids=str,
)
def test_what_a_later_version_holds_is_refused_and_left_alone(tmp_path: Path, extra: dict[str, Any]) -> None:
    store = LocalStore(tmp_path)
    known = json.loads(this_process().model_dump_json())
    text = json.dumps({**known, "machine": "elsewhere", "format": 2, **extra}).encode()
    names = [f"holds/thing.{'a' * 32}.door", f"holds/thing.00000007-{'a' * 32}.ticket"]
    for name in names:
        store.put_bytes(name, text)
    own = leases(tmp_path, QUICK)
    for attempt in (lambda: own.hold("thing", "the thing").__enter__(), lambda: own.holder("thing")):
        with pytest.raises(UserError, match="a later version of orchestrator holds this") as caught:
            attempt()
        assert "remove the file" in str(caught.value)
        assert names[0] in str(caught.value)
    assert [name for name in store.list("holds/") if not name.endswith(".beat")] == sorted(names)
