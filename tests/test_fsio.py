"""Files that appear whole: the old content or the new one, whichever write fails; on the disk before they are named."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from disk_faults import KINDS, Kind, every_fault, goes_through

from orchestrator import fsio
from orchestrator.fsio import (
    _locked,
    atomic_create,
    atomic_write,
    folder_beside,
    link,
    move,
    replacing,
    sha256_of,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the disk, in order: `sync` of a path, `name` of what gets a name."""
    told: list[tuple[str, str]] = []
    fsync, replace, make_link = os.fsync, os.replace, os.link

    def sync(fd: int) -> None:
        told.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        fsync(fd)

    def rename(source: Path, target: Path) -> None:
        told.append(("name", Path(target).name))
        replace(source, target)

    def second(source: Path, target: Path) -> None:
        told.append(("name", Path(target).name))
        make_link(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "link", second)
    return told


# --- which write fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_writer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_old_or_the_new_one_whichever_write_fails(
    tmp_path: Path, kind: Kind, only_writer: bool
) -> None:
    for disk in every_fault(kind, at_least=5):
        folder = tmp_path / str(disk.fail_at)
        folder.mkdir()
        path = folder / "state.json"
        path.write_bytes(b"old")
        went = goes_through(disk, lambda: atomic_write(path, b"new", only_writer=only_writer))  # noqa: B023
        assert path.read_bytes() in ([b"new"] if went else [b"old", b"new"])
        left = [name for name in names(folder) if name != "state.json"]
        assert left == [] or kind == "crash", f"after write {disk.fail_at}"
        assert all(name.startswith(".state.json.partial") for name in left)
        atomic_write(path, "newer", only_writer=only_writer)
        assert path.read_text() == "newer"
        assert names(folder) == ["state.json"] or not only_writer


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_file_is_there_or_not_whichever_write_fails(tmp_path: Path, kind: Kind) -> None:
    for disk in every_fault(kind, at_least=6):
        path = tmp_path / str(disk.fail_at)
        made: list[bool] = []
        went = goes_through(disk, lambda: made.append(atomic_create(path, b"mine")))  # noqa: B023
        assert made == ([True] if went else [])
        assert not path.exists() or path.read_bytes() == b"mine"
        assert path.exists() or not went


def test_what_the_block_raises_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as draft:
            draft.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["weights"]


# --- what is on the disk when -----------------------------------------------------------------------------------


def test_content_is_on_the_disk_before_its_name_and_the_name_after_it(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    atomic_write(tmp_path / "a", b"1", only_writer=True)
    assert events == [("sync", ".a.partial"), ("name", "a"), ("sync", tmp_path.name)]
    events.clear()
    assert atomic_create(tmp_path / "b", b"1")
    (draft, *rest) = events
    assert draft[1].startswith(".b.partial-")
    assert rest == [("name", "b"), ("sync", tmp_path.name)]


def test_a_folder_is_on_the_disk_with_all_that_is_in_it(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    with folder_beside(tmp_path / "set") as beside:
        (beside / "made" / "deep").mkdir(parents=True)
        (beside / "made" / "one").write_bytes(b"1")
        (beside / "made" / "deep" / "two").write_bytes(b"2")
        (beside / "made" / "nowhere").symlink_to("gone")
        move(beside / "made", tmp_path / "set")
    at = events.index(("name", "set"))
    assert {name for what, name in events[:at]} == {"made", "one", "deep", "two"}
    assert events[at + 1 :] == [("sync", tmp_path.name)]
    assert (tmp_path / "set" / "deep" / "two").read_bytes() == b"2"
    assert names(tmp_path) == ["set"]


def test_a_folder_is_made_durably(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    fsio.make_folder(tmp_path / "a" / "b")
    assert events == [("sync", tmp_path.name), ("sync", "a")]
    events.clear()
    fsio.make_folder(tmp_path / "a" / "b")
    assert events == []


def test_what_need_not_last_does_not_wait_for_the_disk(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    atomic_write(tmp_path / "a", b"1", durable=False)
    assert events == [("name", "a")]


def test_a_file_system_that_cannot_sync_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(code: int) -> Callable[[int], None]:
        def fsync(fd: int) -> None:
            if Path(f"/proc/self/fd/{fd}").readlink() == tmp_path:
                raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", refusing(errno.EINVAL))
    atomic_write(tmp_path / "a", b"1")
    monkeypatch.setattr(os, "fsync", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        atomic_write(tmp_path / "a", b"2")


# --- several writers --------------------------------------------------------------------------------------------


def test_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "shared"
    contents = [bytes([letter]) * 100_000 for letter in b"abcd"]

    def write(content: bytes) -> None:
        for _ in range(20):
            atomic_write(path, content, durable=False)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in contents
    assert names(tmp_path) == ["shared"]


def test_only_one_makes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest"
    made: list[bool] = []
    threads = [
        threading.Thread(target=lambda number=number: made.append(atomic_create(path, b"%d" % number)))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.count(True) == 1
    before = path.read_bytes()
    assert not atomic_create(path, b"late")
    assert path.read_bytes() == before
    assert names(tmp_path) == ["manifest"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_there_is_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"1")
    assert not link(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path) == ["a"]


def test_a_folder_beside_goes_also_after_an_error(tmp_path: Path) -> None:
    def make() -> None:
        with folder_beside(tmp_path / "set") as beside:
            assert beside.parent == tmp_path
            assert beside.name.startswith(".set.partial-")
            (beside / "some").write_bytes(b"1")
            raise ValueError("half done")

    with pytest.raises(ValueError, match="half"):
        make()
    assert names(tmp_path) == []


def test_a_folder_beside_removes_what_killed_processes_left_and_nothing_else(tmp_path: Path) -> None:
    left = [
        ".set.partial-dead",
        ".set.partial-alive",
        ".sets.partial-other",
        ".set.partial-new",
        ".set.partial-file",
    ]
    for name in left[:4]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "some").write_bytes(b"1")
    (tmp_path / left[4]).write_bytes(b"1")
    for name in left:
        if not name.endswith("new"):
            os.utime(tmp_path / name, (1.0, 1.0))
    with _locked(tmp_path / left[1]), folder_beside(tmp_path / "set") as beside:
        assert sorted(names(tmp_path)) == sorted([*left[1:], beside.name])
        with folder_beside(tmp_path / "set"):  # two at once leave each other alone
            assert beside.is_dir()
    assert sorted(names(tmp_path)) == sorted(left[1:])


@pytest.mark.parametrize("letter", ["x", "é"])
def test_the_longest_name_that_a_file_may_have(tmp_path: Path, letter: str) -> None:
    path = tmp_path / (letter * (255 // len(letter.encode())))
    atomic_write(path, b"1")
    assert path.read_bytes() == b"1"


# --- hashing ----------------------------------------------------------------------------------------------------


def test_the_hash_of_a_file_by_its_path_or_open(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "a").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / "a") == expected
    with (tmp_path / "a").open("rb") as file:
        assert sha256_of(file) == expected
    assert fsio.Digests().of(tmp_path / "a") == expected
