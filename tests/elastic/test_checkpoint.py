"""What a checkpoint is worth: whole or not there, found damaged when it is, and the same at any worker count."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import latest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file

from orchestrator.errors import UserError
from orchestrator.pipeline.maintenance.checkpoint_table import print_checkpoints
from orchestrator.storage.local import LocalStore
from orchestrator.training.checkpoint import reader
from orchestrator.training.checkpoint.format import COMMIT, CheckpointError, parse, verified
from orchestrator.training.checkpoint.inspect import describe, describe_all
from orchestrator.training.checkpoint.reader import newest, overlaps
from orchestrator.training.checkpoint.shard_file import TensorSlot, file_header, write_file
from orchestrator.training.checkpoint.storage import CheckpointStorage

from .conftest import Group, RunJob, run_group


@pytest.fixture(scope="module")
def saved_at_three_counts(
    forge: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Path], list[Path]]:
    """Checkpoints of 1, 2 and 5 workers at ZeRO 1, 2 and 3, and all their weights."""
    folder = tmp_path_factory.mktemp("counts")
    folders = [folder / f"saved-{world}" for world in (1, 2, 5)]
    truths = [folder / f"truth-{world}.safetensors" for world in (1, 2, 5)]
    for world, zero, saved, truth in zip((1, 2, 5), (1, 2, 3), folders, truths, strict=True):
        run_group(
            forge, folder / f"group-{world}", "save", world, folder=saved, steps=[4], truth=truth, zero=zero
        )
    return folders, truths


def assert_same(left: Path, right: Path) -> None:
    one, other = load_file(left), load_file(right)
    assert one.keys() == other.keys()
    assert len(one) == 20  # 4 tensors: weights, two moments, EMA, copy
    for name, value in one.items():
        assert np.any(value), name
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def best(folder: Path) -> int | None:
    """The step that both the single-process and the collective way find, which must agree."""
    alone = latest(folder)
    together = newest(CheckpointStorage(folder), 0, 1, bool)
    steps = [found.step if found else None for found in (alone, together)]
    assert steps[0] == steps[1]
    return steps[0]


# --- any count of workers -------------------------------------------------------------------------------------


@given(numel=st.integers(0, 200), saved_world=st.integers(1, 12), world=st.integers(1, 12))
def test_ranges_cover_everything_once(numel: int, saved_world: int, world: int) -> None:
    """Against `tensor_split`-like cutting done by hand: what all new workers read, joined, is the whole tensor."""

    def cut(values: list[int], count: int) -> list[list[int]]:
        size = -(-len(values) // count)
        return [values[rank * size : (rank + 1) * size] for rank in range(count)]

    whole = list(range(numel))
    written = cut(whole, saved_world)
    for rank, wanted in enumerate(cut(whole, world)):
        got: list[int | None] = [None] * len(wanted)
        for part in overlaps(numel, saved_world, rank, world):
            assert part.start < part.stop <= len(written[part.rank]), "no file is opened for nothing"
            got[part.into : part.into + part.stop - part.start] = written[part.rank][part.start : part.stop]
        assert got == wanted


@pytest.mark.parametrize(("loads", "zero"), [(1, 3), (3, 1), (5, 2)])
def test_any_count_loads_what_any_count_saved(
    group: Group, saved_at_three_counts: tuple[list[Path], list[Path]], tmp_path: Path, loads: int, zero: int
) -> None:
    """Every weight, moment, EMA and copy is bit-identical, at five workers with short and empty shards."""
    folders, truths = saved_at_three_counts
    results = [tmp_path / f"loaded-{number}.safetensors" for number in range(len(folders))]
    found = group("load", loads, folders=folders, results=results, zero=zero)
    assert found[0]["steps"] == [4] * len(folders)
    assert found[0]["updates"] == 2
    for truth, result in zip(truths, results, strict=True):
        assert_same(truth, result)


def test_workers_fetch_only_what_they_read(group: Group, tmp_path: Path) -> None:
    """Through a store, each on a disk of its own: a worker of four needs what two of eight wrote, and no more."""
    store, truth = tmp_path / "store", tmp_path / "truth.safetensors"
    group("save", 4, folder=tmp_path / "mine", store=store, own_disks=True, steps=[1, 2, 3, 4], truth=truth)
    kept = sorted(path.parent.parent.name for path in (tmp_path / "mine").glob("machine-0/*/*/*.safetensors"))
    assert kept == ["step-00000003", "step-00000004"], "local copies are pruned like the store"
    assert CheckpointStorage(tmp_path, LocalStore(store), "job/checkpoints").committed() == [4, 3]

    result = tmp_path / "result.safetensors"
    found = group(
        "load", 2, folders=[tmp_path / "other"], results=[result], store=store, own_disks=True, copies=[]
    )
    files = [f"step-00000004/a0001/shard-0000{number}-of-00004.safetensors" for number in range(1, 5)]

    assert found[0]["fetched"] == files[:2]
    # The second also reads the second of two elements that the second of four wrote.
    assert found[1]["fetched"] == files[1:]

    # A local copy that is bad is fetched anew, one that is good is not; a store that lost a file is seen.
    mine = tmp_path / "mine" / "machine-0"
    where = CheckpointStorage(mine, LocalStore(store), "job/checkpoints")
    copy = mine / files[0]
    copy.write_bytes(copy.read_bytes()[:-1] + b"!")
    before = copy.stat().st_mtime_ns
    whole = where.whole(4)
    assert copy.stat().st_mtime_ns > before
    assert verified(whole.path).step == 4
    (store / "job" / "checkpoints" / files[2]).unlink()
    (mine / files[2]).unlink()
    with pytest.raises(CheckpointError, match=r"shard-00003-of-00004.safetensors is missing"):
        where.whole(4)
    assert group("find", 2, folder=tmp_path / "third", store=store, own_disks=True) == [3, 3]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_it_too(group: Group, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    truth = tmp_path / "truth.safetensors"
    group("save", 3, folder=tmp_path / "saved", steps=[1], truth=truth)
    expected = load_file(truth)
    state = {name: torch.full(value.shape, float("nan")) for name, value in expected.items()}
    load(
        state,
        storage_reader=HuggingFaceStorageReader(str(tmp_path / "saved/step-00000001/a0001")),
        no_dist=True,
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), value, err_msg=name)


def test_stages_may_add_a_copy_and_nothing_else(group: Group, tmp_path: Path) -> None:
    group("save", 1, folder=tmp_path / "saved", steps=[1], copies=["gram"])
    folder = tmp_path / "saved"
    assert group("restore_other", 1, folder=folder, copies=["gram", "another"]) == [1]
    assert group("restore_other", 2, folder=folder, copies=[]) == [1, 1]
    for change, said in (
        ({"without": ["ema/two"]}, "lacks ema/two, where the model has 2"),
        ({"pretend": {"master/two": 3}}, "has 3 elements of master/two, where the model has 2"),
    ):
        for error in group("restore_other", 2, folder=folder, **change):
            assert said in error["error"]


# --- damage ---------------------------------------------------------------------------------------------------


def test_damage_is_named_and_passed_over(
    group: Group, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "saved"
    group("save", 2, folder=folder, steps=[1, 2])
    bad = folder / "step-00000002"
    victim = bad / "a0001/shard-00002-of-00002.safetensors"
    whole, manifest = victim.read_bytes(), (bad / COMMIT).read_bytes()
    assert best(folder) == 2
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 16
    meta = json.loads(manifest)
    elsewhere = {**meta, "files": {"../../other": next(iter(meta["files"].values()))}}
    for file, content, said in (
        (victim, whole[:-1], f"shard-00002-of-00002.safetensors has {len(whole) - 1} bytes instead of"),
        (victim, b"", "has 0 bytes"),
        (victim, bytes(flipped), "shard-00002-of-00002.safetensors differs from its sha256"),
        (victim, None, "shard-00002-of-00002.safetensors is missing"),
        (bad / COMMIT, None, "it was never committed"),
        (bad / COMMIT, manifest[:100], "is not JSON"),
        (bad / COMMIT, b'{"step": 2, "files": {}}', "has format 1; this version reads format 2"),
        (bad / COMMIT, json.dumps(elsewhere).encode(), "lists other files"),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            verified(bad)
        assert said in str(error.value)
        assert said in (describe(bad).problem or "")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "orchestrator"):
            assert best(folder) == 1
        # One that was never committed is what a killed group leaves, and no damage.
        warned = any(said in line and "step-00000002" in line for line in caplog.messages)
        assert warned == (said != "it was never committed"), said
        victim.write_bytes(whole)
        (bad / COMMIT).write_bytes(manifest)
    assert best(folder) == 2
    # What only one of three workers can see, all of them heed.
    victim.write_bytes(bytes(flipped))
    assert group("find", 3, folder=folder) == [1, 1, 1]
    shutil.rmtree(folder / "step-00000001" / "a0001")
    assert group("find", 2, folder=folder) == [None, None]


def test_trouble_is_no_damage(tmp_path: Path) -> None:
    """A store out of reach is no reason to start anew."""

    class Gone(LocalStore):
        def list(self, prefix: str = "") -> Iterator[str]:
            raise ConnectionError("no route")

    class Half(LocalStore):
        def get_bytes(self, name: str) -> bytes:
            raise ConnectionError("no route")

    store = LocalStore(tmp_path / "store")
    store.put_bytes(f"x/step-00000003/{COMMIT}", b"{}")
    for kind, said in ((Gone, "cannot be listed: ConnectionError: no route"), (Half, "3 cannot be read")):
        with pytest.raises(CheckpointError, match=said):
            newest(CheckpointStorage(tmp_path / "here", kind(tmp_path / "store"), "x"), 0, 1, bool)


@pytest.mark.parametrize("at", ["data", "sync", "part", "manifest", "prune"])
def test_killed_while_saving(group: Group, tmp_path: Path, at: str) -> None:
    """Wherever the axe falls, a checkpoint is whole or not there, and the next group clears up."""
    folder = tmp_path / "saved"
    group("killed", 1, folder=folder, at=at, keep=1, dies=True)
    assert best(folder) == (2 if at == "prune" else 1)
    for path in folder.glob(f"*/{COMMIT}"):
        # In the middle of pruning too: uncommitted first, so that what is committed is whole.
        assert verified(path.parent)
    if at in ("data", "sync"):
        assert not list(folder.glob("step-00000002/**/*.safetensors")), "half a file has no name"
    group("save", 1, folder=folder, steps=[3], keep=1)
    assert sorted(path.name for path in folder.iterdir()) == ["owner.json", "step-00000003"]
    names = sorted(path.name for path in (folder / "step-00000003" / "a0002").iterdir())
    assert names == ["part-00001-of-00001.json", "shard-00001-of-00001.safetensors"]


def test_half_uploaded(group: Group, tmp_path: Path) -> None:
    first, second = group("gone_store", 2, folder=tmp_path / "here", store=tmp_path / "store")
    assert first["said"] == ""
    assert second["said"].startswith("ConnectionError: ")
    assert "step-00000002/a0001/shard-00002-of-00002.safetensors" in second["said"]
    assert "the store is gone" in second["said"]
    assert first["seen"] == second["seen"] == [1]
    assert first["committed"] == second["committed"] == [3, 1]
    left = [path.parts[-3] for path in (tmp_path / "store").rglob("*.safetensors")]
    assert "step-00000002" not in left, "what was given up is pruned"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    folder.mkdir()
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk(group: Group, tmp_path: Path) -> None:
    """Nothing is left of the file, the message says how much was lacking, and training goes on."""
    with small_disk(tmp_path / "disk") as mounted:
        (found,) = group("full", 1, folder=tmp_path / "disk", inject=not mounted)
    assert found["cause"] == "OSError"
    assert "shard-00001-of-00001.safetensors cannot be written: No space left on device" in found["said"]
    assert "MB free, " in found["said"]
    assert found["left"] == []
    assert found["committed"] == [2]


# --- not stopping ---------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_file_is_written(group: Group, tmp_path: Path) -> None:
    truth, result = tmp_path / "truth.safetensors", tmp_path / "result.safetensors"
    found = group("asynchronous", 2, folder=tmp_path / "saved", truth=truth)
    for one in found:
        assert one["written"] == [False, False, True]
        assert one["stall"] < 0.5 < 1.0 <= one["write"]
    group("load", 1, folders=[tmp_path / "saved"], results=[result])
    assert_same(truth, result)


# --- many checkpoints -----------------------------------------------------------------------------------------


def test_pruning(group: Group, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    group("save", 2, folder=folder, steps=[2, 5, 7, 10, 11, 15, 16, 17], keep=2, keep_every=5)
    assert CheckpointStorage(folder).committed() == [17, 16, 15, 10, 5]
    assert sorted(path.name for path in folder.glob("step-*")) == [
        f"step-{step:08d}" for step in (5, 10, 15, 16, 17)
    ]
    # A group that goes on from step 15, the newer ones being damaged, does not let them take good ones' places.
    for step in (16, 17):
        next((folder / f"step-{step:08d}").rglob("*.safetensors")).write_bytes(b"")
    assert best(folder) == 15
    group("save", 1, folder=folder, steps=[16], keep=2)
    assert CheckpointStorage(folder).committed() == [16, 15]
    assert best(folder) == 16
    assert verified(folder / "step-00000016").token == "a0002"


def test_pruning_spares_what_may_be_alive(tmp_path: Path) -> None:
    where = CheckpointStorage(tmp_path)

    def shard(step: int, token: str) -> Path:
        path = tmp_path / f"step-{step:08d}" / token / "shard-00001-of-00001.safetensors"
        digest = write_file(path, file_header({"k": TensorSlot(0, 2, 0, 2)}), memoryview(bytes(8)))["sha256"]
        meta = {"format": 2, "step": step, "updates": 1, "num_workers": 1, "token": token, "keys": {"k": 2}}
        entry = {"size": path.stat().st_size, "sha256": digest}
        (path.parent / "manifest").write_text(json.dumps({**meta, "files": {f"{token}/{path.name}": entry}}))
        return path

    def commit(step: int, token: str) -> None:
        path = shard(step, token)
        where.commit(step, token, (path.parent / "manifest").read_bytes())

    commit(1, "a0001")
    commit(2, "a0002")
    older, own, abandoned = shard(3, "a0001"), shard(3, "a0002"), shard(1, "a0002")
    newer = shard(3, "a0010")
    where.prune(2, "a0002", keep=2, keep_every=None)
    assert [path.exists() for path in (older, own, abandoned, newer)] == [False, True, False, True]
    assert where.committed() == [2, 1]
    assert verified(tmp_path / "step-00000001").token == "a0001"

    # A newer manifest stays even if a worker that was stopped right before its own wakes up.
    kept = (tmp_path / "step-00000002" / COMMIT).read_bytes()
    stale = (shard(2, "a0001").parent / "manifest").read_bytes()
    with pytest.raises(CheckpointError, match=r"may not commit step 2: group a0002 has"):
        where.commit(2, "a0001", stale)
    assert (tmp_path / "step-00000002" / COMMIT).read_bytes() == kept
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    # A format that this version does not know is left alone.
    (tmp_path / "step-00000001" / COMMIT).write_text('{"format": 3}')
    where.sweep("a0099", before=99)
    assert shard(1, "a0001").exists()


def test_zombie(group: Group, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    (found,) = group("zombie", 1, folder=folder)
    assert "group a0001 may not commit: group a0002 has taken over" in found["said"]
    assert found["tokens"] == {"2": "a0002", "1": "a0001"}
    assert best(folder) == 2
    assert verified(folder / "step-00000001").step == 1, "nor may it prune"


def test_manifest_names_are_not_paths() -> None:
    meta = {
        "format": 2, "step": 1, "updates": 1, "num_workers": 1, "token": "../x", "keys": {},
        "files": {"../x/shard-00001-of-00001.safetensors": {"size": 1, "sha256": ""}},
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="other files"):
        parse(json.dumps(meta), Path("/nowhere"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_workers": 10**15}, "other files"),
        ({"files": {"a0001/shard-00001-of-00001.safetensors": None}}, "no valid entry for a0001/shard"),
        (
            {"files": {"a0001/shard-00001-of-00001.safetensors": {"size": "1", "sha256": ""}}},
            "no valid entry",
        ),
        ({"keys": {"master/w": "many"}}, "no valid entry for master/w"),
        ({"format": 3}, "has format 3"),
        ({"token": "../a1"}, "other files"),
    ],
)
def test_a_manifest_that_cannot_be_is_named_at_once(change: dict[str, object], said: str) -> None:
    meta = {
        "format": 2, "step": 1, "updates": 1, "num_workers": 1, "token": "a0001", "keys": {"master/w": 3},
        "files": {"a0001/shard-00001-of-00001.safetensors": {"size": 1, "sha256": ""}},
    }  # fmt: skip
    assert parse(json.dumps(meta), Path("/nowhere")).world == 1
    with pytest.raises(CheckpointError, match=said):
        parse(json.dumps(meta | change), Path("/nowhere"))


@pytest.mark.parametrize("text", ["", "garbage", "[]", '{"token": 7}', '{"token": "../x"}', "[" * 20_000])
def test_a_damaged_owner_is_told_by_the_newest_groups_files(tmp_path: Path, text: str) -> None:
    target = CheckpointStorage(tmp_path)
    assert target.acquire() == "a0001"
    (tmp_path / "step-00000001" / "a0007").mkdir(parents=True)
    (tmp_path / "step-00000001" / "a0007" / "shard-00001-of-00001.safetensors").write_text("x")
    (tmp_path / "owner.json").write_text(text)
    assert target.owner() == "a0007"
    assert target.acquire() == "a0008"
    assert target.owner() == "a0008"


# --- looking --------------------------------------------------------------------------------------------------


def test_inspect(group: Group, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    group("save", 2, folder=folder, steps=[1, 2])
    one = describe(folder / "step-00000002")
    assert (one.step, one.updates, one.workers, one.token, one.problem) == (2, 2, 2, "a0001", None)
    assert {kind.name: (kind.tensors, kind.elements) for kind in one.kinds} == dict.fromkeys(
        ("master", "exp_avg", "exp_avg_sq", "ema", "copies.gram"), (4, 53)
    )
    assert one.size == sum(path.stat().st_size for path in one.path.rglob("*.safetensors"))
    assert one.versions["torch"] == torch.__version__
    victim = folder / "step-00000001" / one.files[0].name
    victim.write_bytes(b"x")
    console = Console(record=True, width=160)
    assert not print_checkpoints(console, describe_all(folder))
    assert print_checkpoints(console, describe_all(folder / "step-00000002"))
    said = console.export_text()
    assert "✗ a0001/shard-00001-of-00002.safetensors has 1 bytes instead of" in said
    for words in ("copies.gram  4", "a0001/shard-00002-of-00002.safetensors", "job", "lab", "✓ good"):
        assert words in said
    with pytest.raises(UserError, match="there is no checkpoint"):
        describe_all(tmp_path)
    check = "import sys, orchestrator.pipeline.maintenance.checkpoint_table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# --- the training loop ----------------------------------------------------------------------------------------


def test_training_uses_the_newest_good_one(run_job: RunJob, tmp_path: Path) -> None:
    run_job(tmp_path, 2, checkpoint_every_s=1e-6)
    folder = tmp_path / "checkpoints"
    kept = sorted(path.name for path in folder.glob("step-*"))
    assert len(kept) == 2, "two newest are kept"
    assert kept[-1] == "step-00000006"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    victim = next((folder / kept[-1]).rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    # Training goes on from the older one, and makes the newest anew.
    again = run_job(tmp_path, 1)
    assert min(again["losses"]) == int(kept[0][5:]) + 1
    assert verified(folder / kept[-1]).world == 1


def test_a_checkpoint_of_a_later_version_is_not_passed_over(tmp_path: Path) -> None:
    """It is not damaged: whoever starts from an older one, or anew, loses what it holds."""
    storage = CheckpointStorage(tmp_path)
    storage.put("step-00000003/checkpoint.json", b'{"format": 99, "step": 3}')
    found, wrong, trouble = reader._manifest(storage, 3)
    assert (found, wrong) == (None, None)
    assert "format 99" in (trouble or "")
    storage.put("step-00000003/checkpoint.json", b'{"format": 1, "step": 3}')
    found, wrong, trouble = reader._manifest(storage, 3)
    assert (found, trouble) == (None, None)
    assert "format 1" in (wrong or "")
