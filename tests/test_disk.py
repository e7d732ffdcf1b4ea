"""What is said of a full disk: which one and how full where that can be seen, else what the error says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.disk import described, existing, file_of, is_full, is_full_at, temporary

ROOMS = {"store": (10, 40_000_000), "tmp": (200, 40_000_000), "large": (4 * 10**12, 5 * 10**12)}


@pytest.fixture(autouse=True)
def rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "space", lambda path: ROOMS[path.name])


def refused(number: int, *files: str) -> OSError:
    error = OSError(number, os.strerror(number), *files[:1])
    if len(files) == 2:
        error.filename2 = files[1]
    return error


def test_the_disk_of_the_file_is_named_with_its_room() -> None:
    said = described(refused(errno.ENOSPC, "/data/store/x"), [Path("/tmp")])
    assert said == "the disk of /data/store is full (0.0 of 40.0 MB free)"


def test_of_a_copy_it_is_the_disk_that_is_written_to() -> None:
    error = refused(errno.ENOSPC, "/data/large/x", "/data/store/y")
    assert described(error) == "the disk of /data/store is full (0.0 of 40.0 MB free)"


def test_without_a_file_the_fullest_folder_is_meant_if_it_is_full() -> None:
    folders = [Path("/data/large"), Path("/data/tmp"), Path("/data/store")]
    assert described(refused(errno.ENOSPC), folders).startswith("the disk of /data/store is full (")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        # A disk without inodes.
        (
            refused(errno.ENOSPC, "/data/large/x"),
            "a disk or a quota is full: No space left on device: /data/large/x",
        ),
        # A file on a third disk, which the error does not name.
        (refused(errno.ENOSPC), "a disk or a quota is full: No space left on device"),
        # A worker on another machine.
        (
            RuntimeError("job failed\n  /w/shard cannot be written: No space left on device (0.1 of 9 MB)\n  x"),
            "a disk or a quota is full: /w/shard cannot be written: No space left on device (0.1 of 9 MB)",
        ),
        (
            refused(errno.EDQUOT, "/data/large/x"),
            "a disk quota is used up: Disk quota exceeded: /data/large/x",
        ),
        (RuntimeError("OSError: Disk quota exceeded"), "a disk quota is used up: OSError: Disk quota exceeded"),
    ],
)  # fmt: skip
def test_a_full_disk_that_cannot_be_seen_is_not_made_up(error: Exception, said: str) -> None:
    assert is_full(error)
    assert described(error, [Path("/data/large")]) == said


def test_a_quota_speaks_of_no_disk_even_beside_a_full_one() -> None:
    assert "the disk of" not in described(refused(errno.EDQUOT), [Path("/data/store")])


def test_what_a_cause_says_counts_and_what_was_hidden_does_not() -> None:
    wrapped = RuntimeError("it failed")
    wrapped.__cause__ = refused(errno.ENOSPC, "/data/store/x")
    assert described(wrapped).startswith("the disk of /data/store is full (")
    hidden = RuntimeError("it failed")
    hidden.__context__ = refused(errno.ENOSPC)
    assert is_full(hidden)
    hidden.__suppress_context__ = True
    assert not is_full(hidden)


def test_an_error_that_does_not_say_why_counts_where_there_is_no_room() -> None:
    error = RuntimeError("(sqlite3.OperationalError) disk I/O error")
    assert is_full_at(error, Path("/data/store"))
    assert not is_full_at(error, Path("/data/large"))
    assert described(error, [Path("/data/store")]) == "the disk of /data/store is full (0.0 of 40.0 MB free)"


def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_the_one_above(tmp_path: Path) -> None:
    assert existing(tmp_path / "not" / "yet") == tmp_path
    (tmp_path / "file").touch()
    assert existing(tmp_path / "file" / "below") == tmp_path / "file"


def test_an_error_may_name_its_file_as_a_path_or_not_at_all() -> None:
    assert file_of(OSError(errno.EIO, "x", Path("/data/x"))) == Path("/data/x")
    assert file_of(OSError(errno.EIO, "x", 7)) is None
    assert file_of(ValueError("x")) is None


def test_the_folder_for_what_does_not_stay_is_named_without_writing_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/data/tmp")
    monkeypatch.setattr(os, "open", None)
    assert temporary() == Path("/data/tmp")
    monkeypatch.delenv("TMPDIR")
    assert temporary() == Path("/tmp")
