from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.store.local import LocalStore, open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_objects_come_back_as_they_were_put(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"file")
    store.put_bytes("a/bytes", b"old")
    store.put_bytes("a/bytes", b"bytes")
    store.put_file("a/file", source)
    store.get_file("a/file", tmp_path / "target")

    assert store.get_bytes("a/bytes") == b"bytes"
    assert (tmp_path / "target").read_bytes() == b"file"
    assert source.exists()
    status = store.stat("a/file")
    assert status is not None
    assert status.size == 4
    store.delete("a/file")
    store.delete("a/file")
    assert store.stat("a/file") is None
    assert store.stat("a/bytes/below-a-file") is None
    with pytest.raises(FileNotFoundError):
        store.get_bytes("a/file")


def test_consumed_file_is_moved_not_copied(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(b"x")
    inode = source.stat().st_ino
    store.put_file("moved", source, consume=True)
    assert not source.exists()
    assert store.local("moved").stat().st_ino == inode


def test_list_is_by_text_prefix_like_s3_and_hides_unfinished_work(store: LocalStore) -> None:
    for name in ("run-1/a", "run-10/a", "run-1/b/c", "other"):
        store.put_bytes(name, b"")
    store.scratch("work").write_text("unfinished")
    assert list(store.list("run-1")) == ["run-1/a", "run-1/b/c", "run-10/a"]
    assert list(store.list("run-1/")) == ["run-1/a", "run-1/b/c"]
    assert list(store.list()) == ["other", "run-1/a", "run-1/b/c", "run-10/a"]
    assert list(store.list("none/")) == []


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/etc/out", "", ".scratch/x"])
def test_names_cannot_leave_the_store(store: LocalStore, name: str) -> None:
    with pytest.raises(ValueError, match="not an object name"):
        store.put_bytes(name, b"")


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
        "import sys; from orchestrator.store.local import LocalStore\n"
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
    with pytest.raises(UserError, match="only local folders"):
        open_store("s3://bucket/prefix")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        open_store(str(tmp_path / "file" / "store"))
