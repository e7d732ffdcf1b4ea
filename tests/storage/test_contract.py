"""What every store promises, asked of each kind of store."""

from __future__ import annotations

import hashlib
import pickle
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.storage.local import LocalStore
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.store import HasRanges, Store


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.cluster)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "store")
    return S3Store(request.getfixturevalue("s3_uri"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_objects_come_back_as_they_were_put(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"file")
    store.put_bytes("a/bytes", b"old")
    store.put_bytes("a/bytes", b"bytes")
    store.put_bytes("a/empty", b"")
    store.put_file("a/file", source)
    store.get_file("a/file", tmp_path / "new" / "target")
    store.get_file("a/empty", tmp_path / "new" / "empty")

    assert store.get_bytes("a/bytes") == b"bytes"
    assert store.get_bytes("a/empty") == b""
    assert (tmp_path / "new" / "target").read_bytes() == b"file"
    assert (tmp_path / "new" / "empty").read_bytes() == b""
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["empty", "target"]
    assert source.exists()


def test_stat_and_delete(store: Store) -> None:
    store.put_bytes("a/b", b"1234")
    status = store.stat("a/b")
    assert status is not None
    assert status.size == 4
    assert status.modified > 1.7e9
    assert store.stat("a") is None
    assert store.stat("a/b/below-an-object") is None
    store.delete("a/b")
    store.delete("a/b")
    assert store.stat("a/b") is None


@pytest.mark.parametrize("name", ["none", "a", "a/none", "a/b/below-an-object"])
def test_what_is_not_there(store: Store, tmp_path: Path, name: str) -> None:
    store.put_bytes("a/b", b"1234")
    for get in (lambda: store.get_bytes(name), lambda: store.get_file(name, tmp_path / "target")):
        with pytest.raises(FileNotFoundError):
            get()
    assert not (tmp_path / "target").exists()


def test_a_consumed_file_is_gone_afterwards(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"file")
    store.put_file("a", source, consume=True)
    assert not source.exists()
    assert store.get_bytes("a") == b"file"


def test_parts_of_objects(store: Store) -> None:
    assert isinstance(store, HasRanges)
    store.put_bytes("a/b", bytes(range(100)))
    assert store.get_range("a/b", 0, 3) == bytes([0, 1, 2])
    assert store.get_range("a/b", 97, 100) == bytes([97, 98, 99])
    assert store.get_range("a/b", 98, 200) == bytes([98, 99])
    for name in ("none", "a", "a/b/below"):
        with pytest.raises(FileNotFoundError):
            store.get_range(name, 0, 1)


def test_a_copy_is_an_object_of_its_own(store: Store, tmp_path: Path) -> None:
    store.put_bytes("a/spaces and + % ümlaut", b"first")
    store.put_bytes("b/target", b"before")
    store.copy("a/spaces and + % ümlaut", "b/target")
    store.copy("a/spaces and + % ümlaut", "c/d")
    store.put_bytes("a/spaces and + % ümlaut", b"second")
    store.delete("c/d")
    assert store.get_bytes("b/target") == b"first"
    assert list(store.list()) == ["a/spaces and + % ümlaut", "b/target"]


@pytest.mark.parametrize("name", ["none", "a", "a/b/below-an-object"])
def test_what_is_not_there_is_not_copied(store: Store, name: str) -> None:
    store.put_bytes("a/b", b"1234")
    with pytest.raises(FileNotFoundError):
        store.copy(name, "copy")
    assert list(store.list()) == ["a/b"]


def test_list_is_by_text_prefix_and_hides_unfinished_work(store: Store) -> None:
    for name in ("run-1/a", "run-10/a", "run-1/b/c", "other", "run-1/B"):
        store.put_bytes(name, b"")
    store.scratch("work").write_text("unfinished")
    assert list(store.list("run-1")) == ["run-1/B", "run-1/a", "run-1/b/c", "run-10/a"]
    assert list(store.list("run-1/")) == ["run-1/B", "run-1/a", "run-1/b/c"]
    assert list(store.list("run-1/b")) == ["run-1/b/c"]
    assert list(store.list()) == ["other", "run-1/B", "run-1/a", "run-1/b/c", "run-10/a"]
    assert list(store.list("none/")) == []


@pytest.mark.parametrize(
    "name", ["spaces and + % & =", "ümlaut/\u00e9/日本", "a..b/.hidden", "~tilde'quote\"#?"]
)
def test_names_may_hold_anything_but_ways_out(store: Store, name: str, tmp_path: Path) -> None:
    store.put_bytes(name, b"content")
    assert list(store.list()) == [name]
    assert store.get_bytes(name) == b"content"
    store.get_file(name, tmp_path / "copy")
    store.delete(name)
    assert list(store.list()) == []


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/out", "", ".scratch/x"])
def test_names_cannot_leave_the_store(store: Store, name: str, tmp_path: Path) -> None:
    for use in (
        lambda: store.put_bytes(name, b""),
        lambda: store.get_bytes(name),
        lambda: store.delete(name),
        lambda: store.stat(name),
        lambda: store.get_file(name, tmp_path / "target"),
        lambda: store.copy(name, "target"),
        lambda: store.copy("source", name),
    ):
        with pytest.raises(ValueError, match="not an object name"):
            use()


def test_it_travels_to_another_process(store: Store) -> None:
    store.put_bytes("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get_bytes("a") == b"1"
    assert (copy.uri, copy.root) == (store.uri, store.root)
    assert copy.scratch("x").parent != store.scratch("x").parent


def test_readers_see_whole_objects_while_they_are_replaced(store: Store) -> None:
    contents = [bytes([letter]) * 300_000 for letter in b"abc"]
    store.put_bytes("object", contents[0])
    end, seen, wrong = threading.Event(), set(), []

    def read() -> None:
        while not end.is_set():
            got = store.get_bytes("object")
            seen.add(got[:1])
            if got not in contents:
                wrong.append((len(got), set(got)))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    # All puts may end before a reader has looked twice.
    deadline, number = time.monotonic() + 60, 0
    while number < 30 or (len(seen) < 2 and time.monotonic() < deadline):
        store.put_bytes("object", contents[number % 3])
        number += 1
    end.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert len(seen) > 1


def test_threads_share_it(store: Store) -> None:
    def work(number: int) -> None:
        for round_ in range(5):
            name = f"{number}/{round_}"
            store.put_bytes(name, name.encode())
            got.append(store.get_bytes(name).decode() == name)

    got: list[bool] = []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] * 40
    assert len(list(store.list())) == 40


@pytest.mark.parametrize("size", [2**24 - 1, 2**24, 2**24 + 1, 5 * 2**23 + 7])
def test_big_files_come_back_bit_by_bit(store: Store, tmp_path: Path, size: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(random.Random(size).randbytes(size))
    store.put_file("big", source)
    status = store.stat("big")
    assert status is not None
    assert status.size == size
    store.get_file("big", target)
    assert sha256(target) == sha256(source)


def test_an_interrupted_put_keeps_the_old_object(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("object", b"old")
    source = tmp_path / "source"
    source.write_bytes(b"new" * 2**23)
    fail: Callable[..., object] = _failing_reader(source)
    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("shutil.copyfile", lambda *paths: fail(source).read())
    with pytest.raises(OSError, match="the disk broke"):
        store.put_file("object", source)
    monkeypatch.undo()
    assert store.get_bytes("object") == b"old"


def _failing_reader(path: Path) -> Callable[..., object]:
    import builtins

    real = builtins.open

    class Failing:
        def __init__(self, file: object) -> None:
            self.file = file

        def read(self, *sizes: int) -> bytes:
            raise OSError("the disk broke")

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def __enter__(self) -> object:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

    def open_(name: object, *args: object, **options: object) -> object:
        file = real(name, *args, **options)  # type: ignore[call-overload]
        return Failing(file) if str(name) == str(path) else file

    return open_
