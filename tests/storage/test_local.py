from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.fsio import NotAFileError
from orchestrator.storage.local import LocalStore
from orchestrator.storage.open import open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_consumed_file_is_moved_not_copied(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(b"x")
    inode = source.stat().st_ino
    store.put_file("moved", source, consume=True)
    assert not source.exists()
    assert store.local("moved").stat().st_ino == inode


def test_failed_put_keeps_the_old_object_and_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("object", b"old")

    def no_space(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        store.put_bytes("object", b"new")
    assert store.get_bytes("object") == b"old"
    assert [name for name in files_below(store.root) if not name.endswith(".lock")] == ["object"]


def test_scratch_of_a_killed_process_goes_and_that_of_a_live_one_stays(tmp_path: Path) -> None:
    code = (
        "import sys; from orchestrator.storage.local import LocalStore\n"
        f"path = LocalStore({str(tmp_path)!r}).scratch('work'); path.write_text('half')\n"
        "print(path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        LocalStore(tmp_path)
        assert path.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    LocalStore(tmp_path)
    assert not path.exists()
    assert files_below(tmp_path) == []


def test_store_travels_to_another_process(store: LocalStore) -> None:
    store.put_bytes("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.get_bytes("a") == b"1"
    assert copy.scratch("x").parent != store.scratch("x").parent


def test_addresses(tmp_path: Path) -> None:
    assert open_store(str(tmp_path / "a")).root == tmp_path / "a"
    assert open_store(f"file://{tmp_path}/b").root == tmp_path / "b"
    assert open_store("s3://bucket/prefix/").uri == "s3://bucket/prefix"
    with pytest.raises(UserError, match="gs:// is not supported"):
        open_store("gs://bucket/prefix")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        open_store(str(tmp_path / "file" / "store"))


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A folder of somebody else, beside the store."""
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "p.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_links_are_listed_and_deleted_and_never_followed(
    store: LocalStore, precious: Path, outside: bool
) -> None:
    target = precious if outside else store.root / "a" / "other"
    if not outside:
        store.put_bytes("a/other/p.txt", b"mine")
    store.put_bytes("a/folder/file", b"x")
    links = ("a/link", "a/folder/link", "a/folder/p.txt")
    for name in links[:2]:
        (store.root / name).symlink_to(target)
    (store.root / links[2]).symlink_to(target / "p.txt")

    assert set(links) < set(store.list("a/"))
    assert "a/link/p.txt" not in set(store.list())
    for name in ("a/link/p.txt", "a/folder/link/p.txt", "a/folder/p.txt"):
        assert store.stat(name) is None
        with pytest.raises(NotAFileError):
            store.get_bytes(name)
        with pytest.raises(NotAFileError):
            store.get_file(name, store.scratch("copy"))
    with pytest.raises(UserError, match="links in a store are not followed"):
        store.put_bytes("a/link/new", b"x")
    with pytest.raises(UserError, match="links in a store are not followed"):
        list(store.list("a/link/"))
    for name in ("a/link/p.txt", "a/folder/link", "a/folder/p.txt"):
        store.delete(name)
    assert not any((store.root / name).is_symlink() for name in links)
    assert [path.name for path in target.iterdir()] == ["p.txt"]
    assert (target / "p.txt").read_text() == "mine"


def test_a_folder_directly_below_the_store_may_be_on_another_disk(store: LocalStore, precious: Path) -> None:
    (store.root / "work").symlink_to(precious)
    store.put_bytes("work/a/b", b"1")
    assert (precious / "a" / "b").read_bytes() == b"1"
    assert list(store.list("work/")) == ["work/a/b", "work/p.txt"]


def test_scratch_folders_are_not_cleared_through_a_link(tmp_path: Path, precious: Path) -> None:
    for name in ("x", "0" * 32):
        (precious / name).mkdir()
        (precious / f"{name}.lock").touch()
    before = files_below(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".scratch").symlink_to(precious)
    LocalStore(tmp_path / "store")
    assert all((precious / name).is_dir() for name in ("x", "0" * 32))
    assert files_below(tmp_path) == before


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_loop])
def test_what_is_no_regular_file_is_no_object(store: LocalStore, make: Callable[[Path], None]) -> None:
    store.put_bytes("a/x", b"1")
    make(store.root / "a" / "odd")
    assert list(store.list("a/")) == ["a/odd", "a/x"]
    assert store.stat("a/odd") is None
    with pytest.raises(NotAFileError, match="not a regular file"):
        store.get_bytes("a/odd")
    with pytest.raises(NotAFileError):
        store.get_file("a/odd", store.root / "copy")
    assert not (store.root / "copy").exists()
    store.delete("a/odd")
    assert list(store.list("a/")) == ["a/x"]


@pytest.mark.parametrize("make", [Path.touch, make_loop])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(
    store: LocalStore, make: Callable[[Path], None]
) -> None:
    make(store.root / "ledger")
    with pytest.raises(UserError, match="a folder of the store cannot be read"):
        store.list("ledger/")
