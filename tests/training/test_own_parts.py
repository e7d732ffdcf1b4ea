"""Who starts from another's checkpoint reads and compares its own slices only; files are linked, not copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.byte_counts import BYTES
from orchestrator.fsio import link_or_copy
from orchestrator.training.checkpoint import own_parts, reader, shard_file
from orchestrator.training.checkpoint.format import (
    COMMIT,
    CheckpointError,
    CheckpointManifest,
    read,
    shard_name,
)
from orchestrator.training.checkpoint.partition import Shard
from orchestrator.training.checkpoint.shard_file import TensorSlot, file_header, write_file

# Elements of each tensor: larger than a part, smaller, and odd.
_TENSORS = {"master/a": 4001, "master/b": 40, "exp_avg/a": 4001, "exp_avg/b": 40}
_PART = 1024
_OF_PROC = 2000


@pytest.fixture
def truth(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(shard_file, "PART", _PART)
    random = torch.Generator().manual_seed(0)
    return {key: torch.randn(numel, generator=random) for key, numel in _TENSORS.items()}


def _kernel_bytes_read() -> int:
    """Bytes that this process has asked the kernel for by reads."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def _save(folder: Path, truth: dict[str, torch.Tensor], world: int) -> CheckpointManifest:
    """As so many workers write it."""
    files = {}
    for rank in range(world):
        slots, shards, start = {}, [], 0
        for key, value in truth.items():
            size = -(-len(value) // world)
            shard = value[rank * size : (rank + 1) * size]
            slots[key] = TensorSlot(start, len(shard), rank * size, len(value))
            shards.append(shard)
            start += len(shard)
        data = memoryview(torch.cat(shards).numpy().tobytes())
        name = shard_name("a0001", rank, world)
        files[name] = write_file(folder / name, file_header(slots), data)
    meta = {"format": 2, "step": 4, "updates": 4, "num_workers": world, "token": "a0001"}
    (folder / COMMIT).write_text(json.dumps({**meta, "keys": _TENSORS, "files": files}))
    return read(folder)


@pytest.fixture
def restored(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[CheckpointManifest, int, int], tuple[dict[str, torch.Tensor], int]]:
    """What worker `rank` of `world` restores from a checkpoint, and how many bytes of it it read."""
    opened: list[own_parts.OwnParts] = []

    class Counted(own_parts.OwnParts):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            opened.append(self)

    def run(manifest: CheckpointManifest, rank: int, world: int) -> tuple[dict[str, torch.Tensor], int]:
        made: dict[str, torch.Tensor] = {}
        opened.clear()

        def shards(engine: object, *, fresh: bool = False) -> Any:
            for key, numel in _TENSORS.items():
                size = -(-numel // world)
                length = max(0, min(numel, (rank + 1) * size) - rank * size)
                yield key, Shard(key, torch.empty(length), rank * size, numel, torch.Size([numel]))

        monkeypatch.setattr(reader, "shards", shards)
        monkeypatch.setattr(reader, "OwnParts", Counted)
        monkeypatch.setattr(reader, "_put", lambda engine, local, updates: made.update(local))
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        before, kernel = BYTES.metrics(), _kernel_bytes_read()
        assert reader.restore(manifest, SimpleNamespace(), compare=True) == 4  # type: ignore[arg-type]
        kernel = _kernel_bytes_read() - kernel
        counted = BYTES.metrics()["driver_checkpoint_bytes_read"] - before["driver_checkpoint_bytes_read"]
        # The kernel's own count has what `/proc` says of it, too.
        assert counted <= kernel <= counted + _OF_PROC
        assert counted == sum(file.bytes_read for file in opened)
        return made, counted

    return run


@pytest.mark.parametrize(("saved_by", "world"), [(1, 1), (1, 4), (3, 2), (4, 4), (2, 5)])
def test_each_worker_reads_its_own_slices_and_no_part_twice(
    tmp_path: Path,
    truth: dict[str, torch.Tensor],
    restored: Callable[[CheckpointManifest, int, int], tuple[dict[str, torch.Tensor], int]],
    saved_by: int,
    world: int,
) -> None:
    manifest = _save(tmp_path, truth, saved_by)
    total = sum(entry["size"] for entry in manifest.files.values())
    for rank in range(world):
        made, bytes_read = restored(manifest, rank, world)
        own = 0
        for key, value in truth.items():
            size = -(-len(value) // world)
            assert torch.equal(made[key], value[rank * size : (rank + 1) * size]), key
            own += 4 * len(made[key])
        slices = [
            part for numel in _TENSORS.values() for part in reader.overlaps(numel, saved_by, rank, world)
        ]
        writers = {part.rank for part in slices}
        # The header's part of each file, and a part at each end of a slice, are read beyond the slices.
        assert own <= bytes_read <= own + _PART * (2 * len(slices) + 2 * len(writers))
        assert bytes_read <= total
        if world > 1:
            assert bytes_read < 0.8 * total


def test_damage_of_a_part_is_met_by_those_who_read_it(
    tmp_path: Path,
    truth: dict[str, torch.Tensor],
    restored: Callable[[CheckpointManifest, int, int], tuple[dict[str, torch.Tensor], int]],
) -> None:
    manifest = _save(tmp_path, truth, 1)
    (name,) = manifest.files
    data = bytearray((tmp_path / name).read_bytes())
    data[-2000] ^= 1  # towards the end of exp_avg/a, which the last worker reads
    (tmp_path / name).write_bytes(data)
    restored(manifest, 0, 4)
    with pytest.raises(CheckpointError, match=r"shard-00001-of-00001\.safetensors differs from its sha256"):
        restored(manifest, 3, 4)
    # As an earlier version wrote it, without the sha256 of parts: all of the file is compared by whoever reads of it.
    entry = manifest.files[name]
    earlier = {name: {"size": entry["size"], "sha256": entry["sha256"]}}
    with pytest.raises(CheckpointError, match="differs from its sha256"):
        restored(CheckpointManifest(tmp_path, {**manifest.meta, "files": earlier}), 0, 4)
    (tmp_path / name).write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="bytes instead of"):
        restored(manifest, 0, 4)


def test_files_are_linked_or_copied_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    link_or_copy(source, target)
    assert target.samefile(source)

    def no_links(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", no_links)
    target.unlink()
    link_or_copy(source, target)
    assert target.read_bytes() == b"new"
    assert not target.samefile(source)


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_linked_to_itself_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    source, same, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    source.write_bytes(b"all there is")
    same.hardlink_to(source)
    other.symlink_to(source)
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    # The same name, another name of the same file, and a link that leads to the target.
    for one, target in ((source, source), (source, same), (other, source)):
        assert link_or_copy(one, target) == target
        assert source.read_bytes() == b"all there is"
    # A link in the place of the target goes, and not what it leads to.
    link_or_copy(source, other)
    assert not other.is_symlink()
    assert other.read_bytes() == source.read_bytes() == b"all there is"
