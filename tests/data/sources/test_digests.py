"""Digests that are remembered are those of the files as they are, whoever else writes and whatever went wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from orchestrator.config.schema import DataSource
from orchestrator.data.sources import digests as module
from orchestrator.data.sources.folder import fingerprint
from orchestrator.storage.cache_database import set_aside
from orchestrator.storage.cache_folder import cache_folder

MOST = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "sub/c.png"):
        (root / name).write_bytes(name.encode() * 50)
    return root


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that are read, as they are."""
    names: list[str] = []
    plain = module.open_regular

    def note(path: Path) -> object:
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(module, "open_regular", note)
    return names


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Waits until what was just written may be trusted, which is two seconds for file systems of all sorts."""
    monkeypatch.setattr(module, "_RACY_NS", 10**7)
    return lambda: time.sleep(0.03)


def _asked(root: Path, files: Sequence[str] = ("a.jpg", "b.jpg", "sub/c.png")) -> list[str | None]:
    def each(call: Callable[[int], object], numbers: Sequence[int]) -> list[object]:
        return [call(number) for number in numbers]

    return module.digests(root, files, MOST, threading.Event(), each)  # type: ignore[arg-type]


def _expected(root: Path, files: Sequence[str] = ("a.jpg", "b.jpg", "sub/c.png")) -> list[str]:
    return [hashlib.sha256((root / file).read_bytes()).hexdigest() for file in files]


def test_what_has_not_changed_is_not_read_again(
    folder: Path, opened: list[str], soon: Callable[[], None]
) -> None:
    soon()
    assert _asked(folder) == _expected(folder)
    assert opened == ["a.jpg", "b.jpg", "c.png"]
    opened.clear()
    assert _asked(folder) == _expected(folder)
    assert opened == []
    # The old ones are not read for a new one's sake.
    (folder / "d.jpg").write_bytes(b"new")
    files = ("a.jpg", "b.jpg", "d.jpg", "sub/c.png")
    assert _asked(folder, files) == _expected(folder, files)
    assert opened == ["d.jpg"]


def test_a_change_within_a_tick_of_the_clock_is_seen(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As git has it: an entry that is as old as its file says nothing, since a later change may have the same times."""
    status = (folder / "a.jpg").stat()
    _asked(folder)
    again = b"z" * status.st_size
    (folder / "a.jpg").write_bytes(again)
    times = {"a.jpg": (status.st_mtime_ns, status.st_ctime_ns)}

    def coarse(found: os.stat_result) -> object:
        # A file system whose clock did not move between the two.
        mtime, ctime = (
            times["a.jpg"] if found.st_ino == status.st_ino else (found.st_mtime_ns, found.st_ctime_ns)
        )
        return module.FileStamp(found.st_size, mtime, ctime)

    monkeypatch.setattr(module, "stamp_of", coarse)
    opened.clear()
    assert _asked(folder) == _expected(folder)
    assert "a.jpg" in opened


def test_a_change_that_hides_its_time_is_seen(folder: Path, soon: Callable[[], None]) -> None:
    soon()
    _asked(folder)
    status = (folder / "a.jpg").stat()
    (folder / "a.jpg").write_bytes(b"z" * status.st_size)
    os.utime(folder / "a.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    # What `cp -p` and `rsync -a` do: another file, with the same size and time, under the same name.
    (folder / "new").write_bytes(b"y" * (folder / "b.jpg").stat().st_size)
    shutil.copystat(folder / "b.jpg", folder / "new")
    (folder / "new").replace(folder / "b.jpg")
    assert _asked(folder) == _expected(folder)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], soon: Callable[[], None]
) -> None:
    soon()
    plain = module.pieces_of

    def slowly(file: object, most: int) -> object:
        pieces = list(plain(file, most))  # type: ignore[arg-type]
        with (folder / "a.jpg").open("ab") as other:
            other.write(b"more")
        yield from pieces

    with monkeypatch.context() as patched:
        patched.setattr(module, "pieces_of", slowly)
        _asked(folder, ["a.jpg"])
    soon()
    opened.clear()
    assert _asked(folder, ["a.jpg"]) == _expected(folder, ["a.jpg"])
    assert opened == ["a.jpg"]


def test_unreadable_and_large_files_have_none(folder: Path, soon: Callable[[], None]) -> None:
    (folder / "b.jpg").unlink()
    os.truncate(folder / "a.jpg", MOST + 1)
    for _ in range(2):
        soon()
        assert _asked(folder) == [None, None, *_expected(folder, ["sub/c.png"])]


def test_a_cache_that_cannot_be_is_done_without(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "file" / "below"))
    assert _asked(folder) == _expected(folder)


def test_a_damaged_database_is_made_again(folder: Path, opened: list[str], soon: Callable[[], None]) -> None:
    soon()
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / module.FILE).write_bytes(b"no database" * 1000)
    for _ in range(2):
        assert _asked(folder) == _expected(folder)
    opened.clear()
    assert _asked(folder) == _expected(folder)
    assert opened == []


def test_what_is_gone_is_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPARE", 0)
    _asked(folder)
    assert set(module._load(str(folder.resolve()))) == {"a.jpg", "b.jpg", "sub/c.png"}
    _asked(folder, ["a.jpg"])
    assert set(module._load(str(folder.resolve()))) == {"a.jpg"}


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    """Four processes remember 200 files each, two of them the same ones, while two more read."""
    code = (
        "import sys, threading; from pathlib import Path; from orchestrator.data.sources.digests import digests;"
        "root = Path(sys.argv[1]); files = sorted(path.name for path in root.iterdir());"
        "[digests(root, files[:50 * (part + 1)], 1 << 20, threading.Event(), lambda call, them: list(map(call, them)))"
        " for part in range(4)]"
    )
    roots = [tmp_path / "x", tmp_path / "y", tmp_path / "x"]
    for root in set(roots):
        root.mkdir()
        for number in range(200):
            (root / f"{number:03}.jpg").write_bytes(f"{root.name}{number}".encode())
    running = [subprocess.Popen([sys.executable, "-c", code, str(root)]) for root in roots]
    assert [process.wait() for process in running] == [0, 0, 0]
    for root in set(roots):
        known = module._load(str(root))
        assert {name: entry.digest.hex() for name, entry in known.items()} == {
            f"{number:03}.jpg": hashlib.sha256(f"{root.name}{number}".encode()).hexdigest()
            for number in range(200)
        }


def test_the_fingerprint_is_what_it_always_was(folder: Path, soon: Callable[[], None]) -> None:
    soon()
    whole = hashlib.sha256()
    for file, digest in zip(("a.jpg", "b.jpg", "sub/c.png"), _expected(folder), strict=True):
        whole.update(f"{len(file)}:{file}={digest};".encode())
    whole.update(b"captions=None")
    for _ in range(2):
        assert fingerprint(DataSource(path=folder)) == whole.hexdigest()


def test_a_file_of_a_far_century_is_hashed_and_not_remembered(folder: Path, opened: list[str]) -> None:
    far = 2**63 + 10**12
    os.utime(folder / "a.jpg", ns=(far, far))
    first = fingerprint(DataSource(path=folder))
    assert fingerprint(DataSource(path=folder)) == first
    assert opened.count("a.jpg") == 2


@pytest.mark.parametrize("file", ["digests.sqlite3", "pictures.sqlite3"])
def test_a_damaged_database_leaves_no_journal(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite would play it back into the next database of this name."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path))
    for name in (file, f"{file}-journal", "other.sqlite3"):
        (tmp_path / name).write_bytes(b"-")
    set_aside(sqlite3.OperationalError("it is locked"), file, "this is")
    assert len(list(tmp_path.iterdir())) == 3
    set_aside(sqlite3.DatabaseError("file is not a database"), file, "this is")
    assert [path.name for path in tmp_path.iterdir()] == ["other.sqlite3"]
