"""What a store holds about runs: manifests of artifacts and checkpoints, ledgers, places in queues, tracking records.

Damage costs what is damaged: it is set aside, or made again, and everything beside it is read as before.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import latest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.errors import UserError
from orchestrator.pipeline.keys.cache_key import KeyParts
from orchestrator.pipeline.maintenance.verify import examine, verify
from orchestrator.pipeline.store.ledger import Ledger
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.local import LocalStore
from orchestrator.storage.manifest import MANIFEST
from orchestrator.tracking.spool import Spool
from orchestrator.training.checkpoint import format
from orchestrator.training.checkpoint.storage import CheckpointStorage

from .mutations import VALUES, damaged_bytes, damaged_values, in_time, sensible, some

KEY = "0123456789abcdef" * 4
PARTS = KeyParts(kind="pretrain", config={"lr": 0.1})
HUGE = [
    b"[" * 200_000,
    b"9" * 10_000,
    b'{"format": ' + b"9" * 10_000 + b"}",
    b"{" + b'"a":1,' * 50_000 + b'"b":2}',
    b"\0" * 4096,
    b"",
]


def any_damage(whole: bytes) -> st.SearchStrategy[bytes]:
    """Bytes damaged, values replaced, fields of later versions, and what is huge."""
    values = damaged_values(json.loads(whole)) | VALUES
    later = st.dictionaries(st.text(max_size=5), VALUES, max_size=2).map(
        lambda more: json.loads(whole) | more
    )
    return st.one_of(
        damaged_bytes(whole),
        (values | later).map(lambda value: json.dumps(value).encode()),
        st.sampled_from(HUGE),
    )


class Fence:
    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def check(self) -> None:
        pass


# --- artifacts --------------------------------------------------------------------------------------------------


class Shelf:
    """A store with two artifacts, of which the first one's manifest gets damaged; nothing else is ever written."""

    def __init__(self, root: Path) -> None:
        self.artifacts = ArtifactStore(LocalStore(root))
        for kind in ("pretrain", "distill"):
            folder = self.artifacts.staging(kind)
            (folder / "model").mkdir()
            (folder / "model" / "a.bin").write_bytes(b"abc")
            (folder / "b.json").write_bytes(b"{}")
            made = self.artifacts.publish(
                kind, KEY, folder, provenance={"seed": 1}, summary={"loss": math.nan}
            )
            if kind == "pretrain":
                self.path = made.path / MANIFEST
        self.whole = self.path.read_bytes()
        self.files = self.listing()

    def listing(self) -> list[str]:
        root = self.artifacts.store.root
        return sorted(
            path.relative_to(root.parent).as_posix() for path in root.parent.rglob("*") if path.is_file()
        )


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf") / "store")


@some(150)
@given(data=st.data())
def test_manifests_of_artifacts(shelf: Shelf, data: st.DataObject) -> None:
    shelf.path.write_bytes(data.draw(any_damage(shelf.whole)))
    with in_time():
        for look in (shelf.artifacts.find, shelf.artifacts.intact):
            try:
                found = look("pretrain", KEY)
            except UserError as error:
                sensible(str(error))
                continue
            assert found is None or set(found.manifest.files) == {"model/a.bin", "b.json"}
        beside = shelf.artifacts.intact("distill", KEY)
        assert beside is not None
        for finding in examine(shelf.artifacts.store):
            assert isinstance(str(finding), str)
    assert shelf.listing() == shelf.files


@some(40)
@given(data=st.data())
def test_verify_says_it_in_words(shelf: Shelf, data: st.DataObject) -> None:
    shelf.path.write_bytes(data.draw(any_damage(shelf.whole)))
    said = io.StringIO()
    with in_time():
        try:
            verify(Console(file=said, width=200), str(shelf.artifacts.store.root))
        except UserError as error:
            sensible(str(error))
    said.getvalue().encode()


# --- checkpoints ------------------------------------------------------------------------------------------------

SHARD = format.shard_name("a0001", 0, 1)
CHECKPOINT: dict[str, Any] = {
    "format": format.FORMAT, "step": 4, "updates": 4, "num_workers": 1, "state": {"t": 0.5}, "skipped": {},
    "token": "a0001", "created": "now", "meta": {"job": "x"}, "versions": {}, "keys": {"master/w": 3},
    "files": {SHARD: {"size": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}},
}  # fmt: skip


@some(150)
@given(data=st.data())
def test_manifests_of_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "checkpoints"
    for step in (4, 8):
        path = folder / format.step_name(step)
        (path / SHARD).parent.mkdir(parents=True, exist_ok=True)
        (path / SHARD).write_bytes(b"abc")
        (path / format.COMMIT).write_text(json.dumps(CHECKPOINT | {"step": step}))
    whole = (folder / format.step_name(8) / format.COMMIT).read_bytes()
    (folder / format.step_name(8) / format.COMMIT).write_bytes(data.draw(any_damage(whole)))
    with in_time():
        found = latest(folder)
        assert found is not None
        assert set(found.files) == {SHARD}
        for value in (found.state, found.skips, found.keys, found.step, found.world):
            assert value is not None
        assert 4 in CheckpointStorage(folder).committed()


@pytest.mark.parametrize(
    "fields",
    [{"state": None}, {"state": {"t": ""}}, {"state": {"t": None}}, {"state": [1]}, {"step": True}, {"step": -1},
     {"step": 2**64}, {"updates": -3}, {"num_workers": 0, "files": {}}, {"num_workers": 10**30}],
)  # fmt: skip
def test_what_was_found_in_checkpoints_is_one_reason(fields: dict[str, Any]) -> None:
    format.parse(json.dumps(CHECKPOINT), Path("x"))
    with pytest.raises(format.CheckpointError):
        format.parse(json.dumps(CHECKPOINT | fields), Path("x"))


@some(80)
@given(data=st.data())
def test_owners_of_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "owned"
    folder.mkdir(exist_ok=True)
    (folder / "owner.json").write_bytes(data.draw(any_damage(b'{"token": "a0007"}')))
    with in_time():
        assert format.TOKEN.fullmatch(CheckpointStorage(folder).acquire())


# --- ledgers ----------------------------------------------------------------------------------------------------


class Book:
    """A ledger of four events, of which one gets damaged."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        book = Ledger(self.store, "toy", Fence())
        book.append("opened", run_id="r")
        book.append("running", stage="a", parts=PARTS, run_id="x", reasons=("never ran",))
        book.append("done", stage="a", parts=PARTS, run_id="x", seconds=2.0, summary={"loss": math.inf})
        book.append("done", stage="b", parts=PARTS, run_id="y", seconds=1.0)
        self.paths = sorted((root / "ledger" / "toy").iterdir())
        self.whole = [path.read_bytes() for path in self.paths]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Book:
    return Book(tmp_path_factory.mktemp("book"))


@some(150)
@given(data=st.data(), number=st.integers(0, 2))
def test_ledgers(book: Book, data: st.DataObject, number: int) -> None:
    for path, whole in zip(book.paths, book.whole, strict=True):
        path.write_bytes(whole)
    book.paths[number].write_bytes(data.draw(any_damage(book.whole[number])))
    with in_time():
        read = Ledger(book.store, "toy")
    assert len(read.unreadable) <= 1
    assert read.state.stages["b"].state == "done"
    for stage in read.state.stages.values():
        assert stage.key is None or len(stage.key) == 64
        assert stage.seconds >= 0 or math.isnan(stage.seconds) or stage.name != "b"


@some(30)
@given(
    names=st.lists(
        st.sampled_from(["0.json", "00000000.json", "00000001-00000009.json", "9" * 60 + ".json", "00000002-1.json",
                         "00000003-" + "9" * 40 + ".json", "driver.lock", "x.json.tmp"]), max_size=4
    ),
    data=st.data(),
)  # fmt: skip
def test_strange_names_in_a_ledger(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("names")
    folder = root / "ledger" / "toy"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(
            data.draw(st.sampled_from([b"", b"{}", b'{"time": 1, "event": "opened"}']))
        )
    with in_time():
        # Whoever takes the hold on a pipeline gets an epoch above its ledger's.
        fence = Fence(1 + Ledger(LocalStore(root), "toy").epoch)
        Ledger(LocalStore(root), "toy", fence).append("opened", run_id="r")
        assert Ledger(LocalStore(root), "toy").state.started


# --- tracking ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Spool]:
    folder = tmp_path_factory.mktemp("spool")
    first = Spool(folder)
    first.post("run", "open", name="x", parent=None)
    for step in range(4):
        first.append("run", step, {"loss": 0.5})
    whole = first.path("run").read_bytes()

    def damaged(damage: bytes) -> Spool:
        lines = whole.split(b"\n")
        lines[2] = damage.replace(b"\n", b" ")
        first.path("run").write_bytes(b"\n".join(lines))
        return Spool(folder)

    return damaged


@some(100)
@given(data=st.data())
def test_tracking_records(spool: Callable[[bytes], Spool], data: st.DataObject) -> None:
    line = b'{"op": "metrics", "channel": "train", "step": 1, "metrics": {"loss": 0.5}, "time_ms": 1}'
    read = spool(data.draw(any_damage(line)))
    with in_time():
        steps = [record["step"] for record in read.history("run", "train")]
        assert {0, 2, 3} <= set(steps)
        assert read.children("nobody") == {}
        read.append("run", 99, {"loss": 1.0})
        assert read.history("run")[-1]["step"] == 99
