"""The spool's copy in the store: complete, cheap to keep, and never a step ahead of itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from orchestrator.pipeline.lease.lease_manager import LeaseLostError
from orchestrator.pipeline.store import spool_backup as module
from orchestrator.pipeline.store.spool_backup import SpoolBackup
from orchestrator.storage.local import LocalStore
from orchestrator.tracking.spool import Spool


class Counting(LocalStore):
    """Counts puts, and fails from the one after the next `left` on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.puts: list[str] = []
        self.left = 10**9

    def put_bytes(self, name: str, data: bytes) -> None:
        if self.left == 0:
            raise OSError("the store is away")
        self.left -= 1
        self.puts.append(name)
        super().put_bytes(name, data)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE", 1000)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(tmp_path / "store")


def machine(store: Counting, folder: Path) -> tuple[SpoolBackup, Spool]:
    return SpoolBackup(store, "spool/toy/", folder), Spool(folder)


def record(spool: Spool, first: int, last: int, run: str = "r1") -> None:
    if first == 0:
        spool.post(run, "open", name="x", parent=None)
    for step in range(first, last):
        spool.append(run, step, {"loss": step + 0.123456789})


def note(spool: Spool, run: str = "r1") -> None:
    """What the flusher does when MLflow has everything."""
    text = json.dumps({"mlflow_run_id": "m", "offset": spool.size(run)})
    spool.path(run).with_suffix(".progress").write_text(text)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_another_machine_gets_it_all(store: Counting, tmp_path: Path) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 60)
    record(spool, 0, 3, run="r2")
    copy = spool.files("r2") / "c0ffee" / "picture.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(bytes(2500))
    (tmp_path / "empty").touch()
    note(spool)
    assert mine.flush()
    theirs, _ = machine(store, tmp_path / "b")
    assert theirs.restore() == ["r1", "r2"]
    assert everything(tmp_path / "b") == everything(tmp_path / "a")
    assert theirs.restore() == []


def test_a_round_sends_only_what_changed(store: Counting, tmp_path: Path) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 200)
    note(spool)
    mine.flush()
    assert len(store.puts) > 10
    store.puts.clear()
    mine.flush()
    assert store.puts == []
    record(spool, 200, 202)
    mine.flush()
    assert 1 <= len(store.puts) <= 3
    # A new driver on the same machine sends no more.
    again, _ = machine(store, tmp_path / "a")
    again.restore()
    store.puts.clear()
    record(spool, 202, 203)
    again.flush()
    assert 1 <= len(store.puts) <= 4


def test_a_driver_that_comes_back_to_its_machine(store: Counting, tmp_path: Path) -> None:
    a, spool_a = machine(store, tmp_path / "a")
    record(spool_a, 0, 50)
    note(spool_a)
    a.flush()
    record(spool_a, 50, 53)
    b, spool_b = machine(store, tmp_path / "b")

    again, _ = machine(store, tmp_path / "a")
    assert again.restore() == [], "its own last seconds stay"
    assert len(spool_a.history("r1")) == 53

    b.restore()
    spool_b.append("r1", 50, {"loss": 0.0})
    record(spool_b, 51, 80)
    note(spool_b)
    b.flush()
    again, _ = machine(store, tmp_path / "a")
    assert again.restore() == ["r1"], "another machine has taken over since"
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert Spool(tmp_path / "a").history("r1")[50]["metrics"] == {"loss": 0.0}


def test_progress_is_never_ahead_of_the_records(store: Counting, tmp_path: Path) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 30)
    note(spool)
    mine.flush()
    for cut in range(12):
        record(spool, 30 + 40 * cut, 70 + 40 * cut)
        note(spool)
        store.left = cut
        assert not mine.flush()
        theirs, other = machine(store, tmp_path / f"b{cut}")
        theirs.restore()
        progress = json.loads((tmp_path / f"b{cut}" / "r1.progress").read_text())
        assert progress["offset"] <= other.size("r1"), f"stopped after {cut} puts"
        store.left = 10**9
    mine.flush()
    machine(store, tmp_path / "last")[0].restore()
    assert everything(tmp_path / "last") == everything(tmp_path / "a")


def test_what_is_gone_here_goes_there(store: Counting, tmp_path: Path) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 1)
    copy = spool.files("r1") / "c0ffee" / "picture.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(bytes(2500))
    mine.flush()
    assert len(list(store.list("spool/toy/r1.files/"))) == 3
    copy.unlink()
    again, _ = machine(store, tmp_path / "a")
    again.restore()
    assert not copy.exists()
    again.flush()
    assert list(store.list("spool/toy/r1.files/")) == []


@pytest.mark.parametrize(("whole", "torn"), [(1700, 2500), (930, 100)])
def test_a_torn_line_that_was_cut_off_leaves_no_trace(
    store: Counting, tmp_path: Path, whole: int, torn: int
) -> None:
    mine, spool = machine(store, tmp_path / "a")
    step = 0
    while spool.size("r1") < whole - 100:
        record(spool, step, step + 1)
        step += 1
    spool.post("r1", "tags", tags={"x": "y" * (whole - spool.size("r1") - 66)})
    with spool.path("r1").open("ab") as file:
        file.write(b"x" * torn)
    mine.flush()
    after = Spool(tmp_path / "a")
    record(after, step, step + 3)
    mine.flush()
    theirs, _ = machine(store, tmp_path / "b")
    theirs.restore()
    assert everything(tmp_path / "b") == everything(tmp_path / "a")


def test_a_store_that_is_away_is_warned_of_once(
    store: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 5)
    store.left = 0
    with caplog.at_level(logging.WARNING):
        assert not mine.flush()
        assert not mine.flush()
    assert len(caplog.records) == 1
    store.left = 10**9
    assert mine.flush()
    machine(store, tmp_path / "b")[0].restore()
    assert everything(tmp_path / "b") == everything(tmp_path / "a")


def test_a_driver_that_was_taken_over_sends_nothing(store: Counting, tmp_path: Path) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 5)

    def lost() -> None:
        raise LeaseLostError("taken over")

    mine.check = lost
    assert not mine.flush()
    assert store.puts == []


def test_it_keeps_up_in_the_background(store: Counting, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "a")
    mine = SpoolBackup(store, "spool/toy/", tmp_path / "a", every_s=0.01)
    with mine.running():
        record(spool, 0, 5)
        for _ in range(500):
            if store.puts:
                break
            module.threading.Event().wait(0.01)
        assert store.puts, "before the end"
        record(spool, 5, 10)
    machine(store, tmp_path / "b")[0].restore()
    assert everything(tmp_path / "b") == everything(tmp_path / "a")


def test_what_is_recorded_while_it_is_sent_comes_with_the_next_round(store: Counting, tmp_path: Path) -> None:
    """Else the copy would hold it twice: at the end of the first piece, and as a piece behind that."""
    mine, spool = machine(store, tmp_path / "a")
    put = store.put_bytes

    def put_while_training(name: str, data: bytes) -> None:
        put(name, data)
        if ".jsonl/" in name:
            record(spool, 1, 3)

    record(spool, 0, 1)
    store.put_bytes = put_while_training  # type: ignore[method-assign]
    assert mine.flush()
    store.put_bytes = put  # type: ignore[method-assign]
    record(spool, 3, 5)
    assert mine.flush()
    again, restored = machine(store, tmp_path / "a")
    assert again.restore() == []
    assert [entry["step"] for entry in restored.history("r1")] == [0, 1, 2, 3, 4]


def test_a_piece_left_over_behind_the_last_is_not_read(store: Counting, tmp_path: Path) -> None:
    mine, spool = machine(store, tmp_path / "a")
    record(spool, 0, 3)
    assert mine.flush()
    store.put_bytes("spool/toy/r1.jsonl/000001", b'{"op": "metrics"}\n')
    other, _ = machine(store, tmp_path / "b")
    other.restore()
    assert everything(tmp_path / "b") == everything(tmp_path / "a")


@pytest.mark.parametrize(
    "name",
    [
        "../../../../outside.jsonl/000000",
        "r1.files/../../../outside/000000",
        "/etc/outside.jsonl/000000",
        "r1.files/a\\b/000000",
        "notes.txt",
        "r1.jsonl/x",
        "r1.files/000000",
    ],
)
def test_hostile_names_in_the_store_lead_nowhere(
    store: Counting, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, spool = machine(store, tmp_path / "one" / "spool")
    record(spool, 0, 5)
    assert first.flush()
    real = list(store.list("spool/toy/"))
    # A bucket may list anything; a folder cannot have most of these names.
    listed = [*real, f"spool/toy/{name}"]
    monkeypatch.setattr(store, "list", lambda prefix="": iter([n for n in listed if n.startswith(prefix)]))
    get = store.get_bytes
    monkeypatch.setattr(store, "get_bytes", lambda n: get(n) if n in real else b"evil")
    folder = tmp_path / "two" / "spool"
    second, restored = machine(store, folder)
    second.restore()
    assert len(restored.history("r1")) == 5
    assert not any(path.read_bytes() == b"evil" for path in tmp_path.rglob("outside*") if path.is_file())
    assert not Path("/etc/outside.jsonl").exists()
