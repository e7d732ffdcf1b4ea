"""What of a stage's unfinished work can be seen while it is being removed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.storage.s3 import S3Store

FILES = [
    f"checkpoints/step-0000000{step}/{name}"
    for step in (4, 8)
    for name in (
        "checkpoint.json",
        "a0002/shard-00001-of-00002.safetensors",
        "a0002/shard-00002-of-00002.safetensors",
    )
]
BEGUN = "begun_from.json"


class Killed(BaseException):
    """Stands for the end of the process."""


def torn(names: set[str]) -> set[str]:
    """The checkpoints that can be seen, of which something is gone."""
    steps = {name.rpartition("/")[0] for name in names if name.endswith("/checkpoint.json")}
    return {step for step in steps if {f for f in FILES if f.startswith(step)} - names}


@pytest.mark.parametrize("survived", range(len(FILES) + 2))
def test_a_removal_cut_short_leaves_no_checkpoint_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    workspace = Workspace(str(tmp_path))
    top = workspace.work("pretrain", "0" * 64)
    for name in FILES:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(name)
    workspace.note_begun("pretrain", "0" * 64, {"teacher": "old"})
    left, unlink = iter(range(survived)), Path.unlink

    def unlink_some(path: Path, missing_ok: bool = False) -> None:
        if next(left, None) is None:
            raise Killed
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_some)
        with contextlib.suppress(Killed):
            workspace.drop_work("pretrain", "0" * 64)
    there = {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()}
    assert len(there) == len(FILES) + 1 - survived
    assert BEGUN in there or not there, "else these checkpoints are taken for those of other inputs"
    assert torn(there) == set()
    workspace.drop_work("pretrain", "0" * 64)
    assert not top.exists()


def test_a_removal_from_a_bucket_shows_no_checkpoint_in_part(
    tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(s3_uri)
    remote = workspace.remote_work("pretrain", "0" * 64)
    assert remote is not None
    store, prefix = remote
    for name in FILES:
        store.put_bytes(prefix + name, name.encode())
    workspace.note_begun("pretrain", "0" * 64, {"teacher": "old"})
    seen: list[set[str]] = []
    delete = S3Store.delete

    def delete_and_look(self: S3Store, name: str) -> None:
        delete(self, name)
        seen.append({name.removeprefix(prefix) for name in self.list(prefix)})

    monkeypatch.setattr(S3Store, "delete", delete_and_look)
    workspace.drop_work("pretrain", "0" * 64)
    assert len(seen) == len(FILES) + 1
    assert seen[-1] == set()
    assert all(BEGUN in names for names in seen[:-1])
    assert [torn(names) for names in seen] == [set()] * len(seen)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"null", b'{"a": 1}', b'{"a": ["student"]}', b"[" * 10_000]
)
def test_pieces_that_cannot_be_read_are_none(tmp_path: Path, text: bytes) -> None:
    workspace = Workspace(str(tmp_path))
    workspace.note_piece("distill", "0" * 64, "nano", "student", "a" * 64)
    (folder,) = (tmp_path / "work").iterdir()
    assert workspace.pieces(folder.name) == {"nano": ("student", "a" * 64)}
    (folder / "pieces.json").write_bytes(text)
    assert workspace.pieces(folder.name) == {}
    assert workspace.reached("distill", "0" * 64) == ""


def test_pieces_are_noted_in_a_bucket_too(tmp_path: Path, s3_uri: str) -> None:
    workspace = Workspace(s3_uri)
    workspace.note_piece("distill", "0" * 64, "nano", "student", "a" * 64)
    workspace.note_piece("distill", "0" * 64, "pico", "student", "b" * 64)
    assert Workspace(s3_uri).pieces("distill-" + "0" * 16) == {
        "nano": ("student", "a" * 64),
        "pico": ("student", "b" * 64),
    }
