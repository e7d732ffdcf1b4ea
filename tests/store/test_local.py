from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.store.local import LocalStore
from orchestrator.store.open import open_store


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
    assert open_store("s3://bucket/prefix/").uri == "s3://bucket/prefix"
    with pytest.raises(UserError, match="gs:// is not supported"):
        open_store("gs://bucket/prefix")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        open_store(str(tmp_path / "file" / "store"))
