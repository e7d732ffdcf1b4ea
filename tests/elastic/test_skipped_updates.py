"""An update whose gradient is not finite is left out, on all workers alike, and everybody hears of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from orchestrator.data.index import ImageIndex
from orchestrator.pipeline.maintenance.checkpoint_table import print_checkpoints
from orchestrator.stages.common.config import ModelRecipe
from orchestrator.stages.common.crops import crop_blocks
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.training.checkpoint.inspect import describe_all
from orchestrator.training.out_of_memory import is_out_of_memory
from orchestrator.training.skipped_updates import Skips, named

from .conftest import CONFIG, RECIPE, RunJob
from .test_chunks import saved

# Four blocks: two workers divide them, three do not.
SPIKES = {"gradients": [[0, 3], [2, 1]]}


def manifest(work: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint(work, step) / "checkpoint.json").read_text())
    return found


def checkpoint(work: Path, step: int) -> Path:
    return work / "checkpoints" / f"step-{step:08d}"


def samples(index: Path, step: int, block: int) -> list[int]:
    """The ids of a block, from the dataset itself."""
    config, recipe = Pretrain.model_validate(CONFIG), ModelRecipe.model_validate(RECIPE)
    assert len(ImageIndex.load(index)) == 40
    return [int(row) for row in crop_blocks(config, recipe, index, 7).load(step, block).ids]


def assert_equal(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> None:
    assert ours.keys() == theirs.keys()
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor], value, err_msg=tensor)


@pytest.mark.parametrize(
    ("zero", "world", "precision"),
    [
        (0, 2, "fp32"),
        (0, 1, "bf16"),
        (1, 2, "fp32"),
        (2, 3, "fp32"),
        (3, 1, "fp32"),
        (3, 3, "fp32"),
        (3, 2, "bf16"),
        (2, 2, "bf16"),
    ],
)
def test_a_skipped_update_leaves_everything_as_it_was(
    run_job: RunJob, index: Path, tmp_path: Path, zero: int, world: int, precision: str
) -> None:
    """Weights, moments, EMA and AdamW's count; only the step goes on."""
    common = {"zero_stage": zero, "precision": precision, "spikes": {"gradients": [[2, 1]]}}
    before = run_job(tmp_path / "before", world, stop_after=2, **common)
    after = run_job(tmp_path / "after", world, stop_after=3, **common)
    assert_equal(saved(checkpoint(tmp_path / "after", 3)), saved(checkpoint(tmp_path / "before", 2)))
    said = manifest(tmp_path / "after", 3)
    assert (said["step"], said["updates"], said["skipped"]["total"]) == (3, 2, 1)
    assert manifest(tmp_path / "before", 2)["skipped"] == {"total": 0, "recent": []}
    assert before["troubles"] == []
    (trouble,) = after["troubles"]
    assert trouble.startswith("step 3: the update was skipped")
    assert trouble.endswith(f"{named({1: samples(index, 2, 1)})}")
    metrics = dict(after["metrics"])
    assert "skipped_updates" not in metrics[2]
    assert metrics[3]["skipped_updates"] == 1
    assert all(np.isfinite(value) for value in metrics[3].values())
    assert np.isfinite(metrics[3]["loss"])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_training_goes_on_after_it(run_job: RunJob, tmp_path: Path, zero: int) -> None:
    """Checkpoints from before the first update load, and later updates move the weights."""
    first = run_job(tmp_path, 2, stop_after=1, spikes=SPIKES, zero_stage=zero)
    assert manifest(tmp_path, 1)["updates"] == 0
    assert not any(value.any() for name, value in saved(checkpoint(tmp_path, 1)).items() if "exp_avg" in name)
    # Three workers: shards have padding, which a gradient that is not finite must not spoil for later ones.
    second = run_job(tmp_path, 3, spikes=SPIKES, zero_stage=zero)
    assert second["complete"]
    counts = [metrics["skipped_updates"] for _, metrics in first["metrics"] + second["metrics"]]
    assert counts == [1, 1, 2, 2, 2, 2]
    assert manifest(tmp_path, 6)["updates"] == 4
    assert len(second["troubles"]) == 1


def test_inspect_shows_them(run_job: RunJob, index: Path, tmp_path: Path) -> None:
    for steps in (2, 1):
        run_job(tmp_path, 2, stop_after=steps, spikes={"gradients": [[2, 1]]})
    console = Console(record=True, width=200)
    assert print_checkpoints(console, describe_all(tmp_path / "checkpoints"))
    header, *lines = (line.split() for line in console.export_text().splitlines() if line.strip())
    assert header[:4] == ["step", "updates", "skipped", "workers"]
    assert [line[:4] for line in lines] == [["2", "2", "0", "2"], ["3", "2", "1", "2"]]
    assert print_checkpoints(console, describe_all(checkpoint(tmp_path, 3)))
    words = " ".join(console.export_text().split())
    assert "step 3 updates 2 skipped 1 workers 2" in words
    assert f"skipped updates step 3: {named({1: samples(index, 2, 1)})}" in words


def test_exact_sums_are_the_same_at_any_number_of_workers_and_after_a_stop(
    run_job: RunJob, tmp_path: Path
) -> None:
    alone = run_job(tmp_path / "alone", 1, exact=True, spikes=SPIKES)
    theirs = saved(checkpoint(tmp_path / "alone", 6))
    for world in (2, 3):
        got = run_job(tmp_path / f"at-{world}", world, exact=True, spikes=SPIKES)
        assert_equal(saved(checkpoint(tmp_path / f"at-{world}", 6)), theirs)
        assert got["troubles"] == alone["troubles"]
        assert manifest(tmp_path / f"at-{world}", 6)["skipped"] == manifest(tmp_path / "alone", 6)["skipped"]
    for world, stop_after in ((2, 1), (3, 2), (1, None)):
        run_job(tmp_path / "stopped", world, exact=True, spikes=SPIKES, stop_after=stop_after)
    assert_equal(saved(checkpoint(tmp_path / "stopped", 6)), theirs)
    for key in ("skipped", "updates"):
        assert manifest(tmp_path / "stopped", 6)[key] == manifest(tmp_path / "alone", 6)[key]


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_end_the_stage_with_their_steps_and_samples(
    run_job: RunJob, index: Path, tmp_path: Path, world: int
) -> None:
    """Also those from before a stop."""
    spikes = {"gradients": [[0, 3], [2, 1], [3, 2], [3, 0]]}
    run_job(tmp_path, 2, stop_after=2, spikes=spikes, max_skipped_updates=2)
    ended = run_job(tmp_path, world, spikes=spikes, max_skipped_updates=2)
    said = ended["error"]
    assert "3 updates were skipped within 200 steps" in said
    lines = [
        f"step 1: {named({3: samples(index, 0, 3)})}",
        f"step 3: {named({1: samples(index, 2, 1)})}",
        f"step 4: {named({0: samples(index, 3, 0), 2: samples(index, 3, 2)})}",
    ]
    assert all(line in said for line in lines), said
    assert "max_skipped_updates" in said.splitlines()[-1]
    assert [step for step, _ in ended["metrics"]] == [3]


@pytest.mark.parametrize("world", [1, 3])
def test_a_loss_that_is_not_finite_names_the_samples_of_its_block(
    run_job: RunJob, index: Path, tmp_path: Path, world: int
) -> None:
    said = run_job(tmp_path, world, spikes={"losses": [[1, 2]]})["error"]
    assert "loss not finite at step 2" in said
    assert f"in {named({2: samples(index, 1, 2)})};" in said


def test_out_of_memory_says_what_needed_it_and_what_to_set(run_job: RunJob, tmp_path: Path) -> None:
    said = run_job(tmp_path, 1, spikes={"memory": [[1, 2]]})["error"]
    assert "out of memory in step 2, with a batch of 16 samples in 4 blocks of 4" in said
    assert "globals 2x4x3x32x32" in said
    assert "locals 2x4x3x16x16" in said
    assert "Tried to allocate 20.00 GiB" in said
    for key in ("activation_checkpointing", "chunk_rows", "block_size"):
        assert f"`{key}" in said
    assert "at   stages.test" in said


def test_memory_is_told_from_other_trouble() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value), raised.value
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("block 1 of step 2 could not be loaded: MemoryError: "))
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_limit_is_a_share_of_the_newest_steps() -> None:
    in_a_row = Skips()
    assert [in_a_row.add(step, "", 3) for step in range(5)] == [False, False, False, True, True]
    rare = Skips()
    assert not any(rare.add(step, "", 3) for step in range(0, 10_000, 100))
    assert (rare.total, len(rare.recent)) == (100, 3)
    assert Skips().add(1, "", 0), "none is allowed"


def test_what_a_checkpoint_says_of_them_is_read_with_care() -> None:
    skips = Skips(2, [(4, "block 1 (samples 3)"), (9, "block 0 (samples 5)")])
    assert Skips.of(json.loads(json.dumps(skips.saved()))) == skips
    records: tuple[Any, ...] = (None, [], {}, {"total": "2"}, 7)
    for damaged in records:
        assert Skips.of(damaged) == Skips()
    assert Skips.of({"total": 2, "recent": [["a"], 3, [1, "x"]]}) == Skips(2, [(1, "x")])


def test_long_lists_are_cut() -> None:
    assert named({3: [5, -8]}) == "block 3 (samples 5, 7)"
    assert named({0: range(18)}).endswith("14, 15 and 2 more)")
    assert named({index: [0] for index in range(10)}).endswith("block 7 (samples 0), 2 more blocks")
    many = Skips(30, [(step, "x") for step in range(30)])
    assert len(many.listed().splitlines()) == 21
