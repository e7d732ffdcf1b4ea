"""Events add up to the state of a pipeline, across processes."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import get_args

import pytest
from disk_faults import KINDS, Kind, every_fault, goes_through
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.errors import UserError
from orchestrator.pipeline.keys.cache_key import KeyParts
from orchestrator.pipeline.lease.lease_manager import LeaseLostError
from orchestrator.pipeline.store.ledger import Event, Happening, Ledger, UnreadableRecordError, parse
from orchestrator.storage.local import LocalStore

ONE = KeyParts(kind="pretrain", config={"lr": 0.1})
TWO = KeyParts(kind="pretrain", config={"lr": 0.2})


class Fence:
    """A hold that was got as the `epoch`-th, and may be lost."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.lost = False

    def check(self) -> None:
        if self.lost:
            raise LeaseLostError("lost")


def ledger(folder: Path, fence: Fence | None = None) -> Ledger:
    return Ledger(LocalStore(folder), "toy", fence or Fence(1))


def test_what_one_handle_writes_another_reads(tmp_path: Path) -> None:
    first, second = ledger(tmp_path), ledger(tmp_path)
    first.append("opened", run_id="r")
    first.append("running", stage="a", parts=ONE, run_id="x", reasons=("never ran",))
    first.append(
        "done", stage="a", parts=ONE, run_id="x", seconds=2.0, summary={"loss": math.nan, "max": math.inf}
    )
    first.append("closed", status="FINISHED")
    state = second.refresh()
    stage = state.stages["a"]
    assert (state.run_id, state.open, state.status) == ("r", False, "FINISHED")
    assert (stage.state, stage.key, stage.attempts, stage.seconds, stage.run_id) == (
        "done",
        ONE.key,
        1,
        2.0,
        "x",
    )
    assert math.isnan(stage.summary["loss"])
    assert stage.summary["max"] == math.inf
    second.append("opened", run_id="s")
    assert len(list((tmp_path / "ledger" / "toy").glob("*.json"))) == 5
    assert ledger(tmp_path).state.run_id == first.refresh().run_id == "s"


def test_attempts_and_time_add_up_for_one_key_and_start_anew_for_another(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for event in ("running", "stopped", "running", "failed", "running"):
        book.append(event, stage="a", parts=ONE, run_id="x", seconds=1.0 if event != "running" else None)
    stage = book.state.stages["a"]
    assert (stage.state, stage.attempts, stage.seconds) == ("running", 3, 2.0)
    book.append("settled", stage="a")
    assert (stage.state, stage.key, stage.run_id) == ("stopped", ONE.key, "x")
    book.append("running", stage="a", parts=TWO, run_id="y")
    assert (stage.state, stage.key, stage.attempts, stage.seconds, stage.run_id) == (
        "running",
        TWO.key,
        1,
        0.0,
        "y",
    )


def test_a_reused_artifact_brings_its_own_key_and_no_run(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append("running", stage="a", parts=ONE, run_id="x")
    book.append("done", stage="a", parts=ONE, run_id="x", seconds=1.0)
    book.append("done", stage="a", parts=TWO, reused=True, summary={"loss": 1.0})
    stage = book.state.stages["a"]
    assert (stage.key, stage.attempts, stage.run_id, stage.reused) == (TWO.key, 0, None, True)


def test_attempts_begin_anew_after_done_and_with_a_new_run(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    for event in ("running", "failed", "running", "done"):
        book.append(event, stage="a", parts=ONE, run_id="x")
    stage = book.state.stages["a"]
    assert (stage.attempts, stage.state) == (2, "done")
    book.append("running", stage="a", parts=ONE, run_id="y", anew=True, code="c")
    assert (stage.attempts, stage.anew, stage.code) == (1, True, "c")
    book.append("failed", stage="a", parts=ONE, run_id="y")
    book.append("running", stage="a", parts=ONE, run_id="y", anew=True)
    assert (stage.attempts, stage.anew) == (2, True)
    book.append("running", stage="a", parts=ONE, run_id="z", anew=True)
    assert stage.attempts == 1, "it starts over"
    book.append("done", stage="a", parts=ONE, run_id="z")
    assert (stage.attempts, stage.anew) == (1, False)


def test_the_newest_that_was_made_is_kept_beside_the_newest_key(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append("running", stage="a", parts=ONE, run_id="x")
    assert book.state.stages["a"].made is None
    book.append("done", stage="a", parts=ONE, run_id="x")
    book.append("running", stage="a", parts=TWO, run_id="y")
    book.append("failed", stage="a", parts=TWO, run_id="y")
    stage = ledger(tmp_path).state.stages["a"]
    assert stage.parts is not None
    assert stage.made is not None
    assert (stage.parts.key, stage.made.key) == (TWO.key, ONE.key)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "ledger" / "toy").iterdir())


def test_nothing_is_written_once_the_hold_is_lost(tmp_path: Path) -> None:
    fence = Fence(1)
    book = ledger(tmp_path, fence)
    book.append("opened", run_id="r")
    fence.lost = True
    with pytest.raises(LeaseLostError):
        book.append("closed", status="FINISHED")
    assert len(names(tmp_path)) == 1
    assert book.state.open


@pytest.mark.parametrize("stale_first", [True, False])
def test_what_a_stale_driver_writes_has_no_effect(tmp_path: Path, stale_first: bool) -> None:
    old, watcher = ledger(tmp_path, Fence(3)), ledger(tmp_path)
    old.append("opened", run_id="old")
    old.append("running", stage="a", parts=ONE, run_id="x")
    new = ledger(tmp_path, Fence(4))

    def stale() -> None:
        old.append("done", stage="b", parts=TWO, run_id="stale")
        old.append("failed", stage="a", parts=ONE, run_id="x", error="stale")
        old.append("closed", status="FAILED")

    if stale_first:
        stale()
        assert watcher.refresh().status == "FAILED", "until the new one writes, there is no telling"
    new.append("opened", run_id="new")
    new.append("done", stage="a", parts=ONE, run_id="x", seconds=1.0)
    if not stale_first:
        stale()
    assert len(names(tmp_path)) == 7, "nothing was overwritten"
    for reader in (watcher, new, ledger(tmp_path)):
        state = reader.refresh()
        assert (state.run_id, state.open, state.status) == ("new", True, None)
        assert state.stages.keys() == {"a"}
        assert (state.stages["a"].state, state.stages["a"].error) == ("done", None)
    assert ledger(tmp_path).epoch == 4


def test_a_ledger_of_an_earlier_version_is_read_and_continued(tmp_path: Path) -> None:
    folder = tmp_path / "ledger" / "toy"
    folder.mkdir(parents=True)
    for number, event in enumerate(("opened", "closed")):
        text = Event(time=1.0, event=event, status="KILLED", run_id="r").model_dump_json(
            exclude_defaults=True
        )  # type: ignore[arg-type]
        (folder / f"{number:08d}.json").write_text(text)
    (folder / "driver.lock").write_text("{}")
    book = ledger(tmp_path, Fence(1))
    assert (book.state.run_id, book.state.status, book.epoch) == ("r", "KILLED", 0)
    book.append("opened", run_id="r")
    assert names(tmp_path) == ["00000000.json", "00000001.json", "00000002-00000001.json", "driver.lock"]
    assert ledger(tmp_path).state.open


def damage(folder: Path, number: int, text: bytes) -> str:
    path = sorted((folder / "ledger" / "toy").iterdir())[number]
    path.write_bytes(text)
    return path.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "EOF"),
        (b'{"time": 1.0, "event": "runn', "EOF"),
        (b"\xff\x00garbage", "Invalid JSON"),
        (b"[" * 10_000, "Invalid JSON"),
        (b"null", "should be an object"),
        (b'{"time": 1.0, "event": "danced"}', "event: Input should be"),
        (b'{"time": Infinity, "event": "closed"}', "time: Input should be"),
        (b'{"time": 1.0, "event": "done", "stage": "a", "seconds": Infinity}', "seconds: Input should be"),
        (b'{"time": 1.0, "event": "done", "stage": "a", "seconds": 1e308}', "seconds: Input should be"),
        (b'{"time": 1.0, "event": "done", "stage": "a", "seconds": NaN}', "seconds: Input should be"),
        (b'{"format": 7, "moment": 1.0}', "format 7, and this version reads formats up to 1"),
        (b'{"time": 1.0, "event": "running", "stage": "../a"}', "stage: "),
        (b'{"time": 1.0, "event": "opened", "run_id": "../a"}', "run_id: "),
        (
            b'{"time": 1.0, "event": "done", "stage": "a", "parts": {"kind": "../../x", "config": {}}}',
            "not an object name",
        ),
    ],
)
def test_an_unreadable_event_is_set_aside_by_name(
    tmp_path: Path, text: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    book = ledger(tmp_path)
    book.append("opened", run_id="r")
    book.append("running", stage="a", parts=ONE, run_id="x")
    book.append("done", stage="a", parts=ONE, run_id="x", seconds=1.0)
    name = damage(tmp_path, 1, text)
    for _ in range(2):
        later = ledger(tmp_path, Fence(2))
        assert (later.state.run_id, later.state.stages["a"].state) == ("r", "done")
    assert [line.getMessage() for line in caplog.records if name in line.getMessage()] == [
        line.getMessage() for line in caplog.records
    ]
    assert len(caplog.records) == 1, "one line, however often it is read"
    assert later.unreadable == [f"ledger/toy/{name}"]
    assert said in caplog.text
    assert len(caplog.records[0].getMessage().splitlines()) == 1
    later.append("closed", status="FINISHED")
    assert names(tmp_path)[-1] == "00000003-00000002.json"
    assert (tmp_path / "ledger" / "toy" / name).read_bytes() == text, "nothing is done to it"


@pytest.mark.parametrize("digits", [19, 245])
def test_a_number_that_no_run_can_have_is_no_event(tmp_path: Path, digits: int) -> None:
    ledger(tmp_path).append("opened", run_id="r")
    copy_event(tmp_path, "9" * digits)
    later = ledger(tmp_path, Fence(2))
    later.append("closed", status="FINISHED")
    assert "00000001-00000002.json" in names(tmp_path)


def test_after_the_highest_number_an_error_names_the_record(tmp_path: Path) -> None:
    ledger(tmp_path).append("opened", run_id="r")
    copy_event(tmp_path, "9" * 18)
    before = names(tmp_path)
    with pytest.raises(UserError, match="highest number") as caught:
        ledger(tmp_path, Fence(2)).append("closed", status="FINISHED")
    assert "9" * 18 + ".json" in str(caught.value)
    assert names(tmp_path) == before


def copy_event(folder: Path, number: str) -> None:
    place = folder / "ledger" / "toy"
    first = min(place.iterdir())
    (place / f"{number}.json").write_bytes(first.read_bytes())


def test_a_damaged_last_event_is_neither_overwritten_nor_forgotten_as_a_number(tmp_path: Path) -> None:
    book = ledger(tmp_path, Fence(3))
    book.append("opened", run_id="r")
    book.append("running", stage="a", parts=ONE, run_id="x")
    damage(tmp_path, 1, b"{")
    later = ledger(tmp_path, Fence(4))
    assert later.epoch == 3
    later.append("opened", run_id="s")
    assert names(tmp_path) == ["00000000-00000003.json", "00000001-00000003.json", "00000002-00000004.json"]


def test_fields_of_a_later_version_are_kept_and_count_for_its_keys(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.append("running", stage="a", parts=ONE, run_id="x")
    path = next((tmp_path / "ledger" / "toy").iterdir())
    record = json.loads(path.read_text())
    assert record["format"] == 1
    record |= {"mood": "fine", "parts": record["parts"] | {"salt": 7}}
    path.write_text(json.dumps(record))
    stage = ledger(tmp_path).state.stages["a"]
    assert stage.state == "running"
    assert stage.key not in (None, ONE.key)
    assert parse(path.read_bytes()).model_dump()["mood"] == "fine"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_an_event_is_more_than_that_event(tmp_path: Path, data: st.DataObject) -> None:
    whole = Event(time=1.0, event="done", stage="a", parts=ONE, run_id="x").model_dump_json().encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    text = whole[:at] if cut else whole[:at] + data.draw(st.binary(min_size=1, max_size=3)) + whole[at + 1 :]
    with contextlib.suppress(UnreadableRecordError):
        assert parse(text).event in get_args(Happening)


@pytest.mark.parametrize("kind", KINDS)
def test_an_append_happens_or_does_not_whichever_write_fails(tmp_path: Path, kind: Kind) -> None:
    for disk in every_fault(kind, at_least=5):
        folder = tmp_path / str(disk.fail_at)
        book = ledger(folder)
        book.append("opened", run_id="r")
        went = goes_through(disk, lambda: book.append("running", stage="a", parts=ONE, run_id="x"))  # noqa: B023
        read = ledger(folder, Fence(2)).state.stages
        assert "a" in read or not went, f"what was appended is there, write {disk.fail_at}"
        if kind != "crash":
            # Whoever goes on in the same process sees what is there.
            book.append("running", stage="c", parts=TWO, run_id="z")
            assert ledger(folder).state.stages["c"].state == "running"
            assert ("a" in ledger(folder).state.stages) == ("a" in read)
        later = ledger(folder, Fence(2))
        later.append("running", stage="b", parts=TWO, run_id="y")
        assert ledger(folder).state.stages["b"].state == "running"
        assert ("a" in ledger(folder).state.stages) == ("a" in read)


def test_a_reader_gets_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = ledger(tmp_path), ledger(tmp_path)
    read = []
    original = LocalStore.get_bytes

    def get_bytes(self: LocalStore, name: str) -> bytes:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(LocalStore, "get_bytes", get_bytes)
    for count in range(1, 60):
        writer.append("opened", run_id=str(count))
        if count % 20 == 0:
            assert reader.refresh().run_id == str(count)
            assert len(read) == count
