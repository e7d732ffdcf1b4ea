"""Held-out photos: nobody trains on them, and their loss is the same at any number of workers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.index import ImageIndex
from orchestrator.elastic.run_monitor import RunMonitor

from .conftest import RECIPE, RunJob
from .test_chunks import saved
from .worker import LOOK_S

STEPS = 4
CONFIG = {
    "steps": STEPS,
    "frozen_prototype_steps": 0,
    "homogeneous": None,
    "homogeneous_ratio": None,
    "mix": None,
}
# Last of each kind, so that the others are drawn as if they were all.
HELD_OUT = range(34, 40)


@pytest.fixture
def split(index: Path, tmp_path: Path) -> Path:
    """The index with six photos held out."""
    whole, folder = ImageIndex.load(index), tmp_path / "split"
    folder.mkdir()
    ImageIndex(
        [
            replace(whole[row], component="held_out" if row in HELD_OUT else "balanced")
            for row in range(len(whole))
        ]
    ).save(folder)
    return folder


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_looking_at_them_changes_no_weight(
    run_job: RunJob, split: Path, tmp_path: Path, zero_stage: int
) -> None:
    common = {"index": split, "zero_stage": zero_stage}
    plain = run_job(tmp_path / "plain", 2, config=CONFIG, **common)
    looked = run_job(tmp_path / "looked", 2, config={**CONFIG, "validate_every": 3}, **common)
    assert looked["losses"] == plain["losses"]
    last = f"checkpoints/step-{STEPS:08d}"
    theirs = saved(tmp_path / "plain" / last)
    for name, value in saved(tmp_path / "looked" / last).items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    found = looked["held_out"]
    assert list(found) == [3, 4], "every third step, and the last"
    assert {"loss", "dino_global", "ibot", "koleo"} <= set(found[3])
    assert found[3]["loss"] != found[4]["loss"], "the weights moved"
    assert plain["held_out"] == {}


def test_their_loss_does_not_depend_on_workers_or_stops(run_job: RunJob, split: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "validate_every": 1}
    common = {"index": split, "config": config, "exact": True}
    alone = run_job(tmp_path / "alone", 1, **common)["held_out"]
    three = run_job(tmp_path / "three", 3, **common)["held_out"]
    run_job(tmp_path / "stopped", 2, stop_after=2, **common)
    rest = run_job(tmp_path / "stopped", 3, **common)["held_out"]
    assert sorted(rest) == [3, 4]
    for step, metrics in alone.items():
        assert {"loss", "seconds"} <= metrics.keys()
        for name in metrics.keys() - {"seconds"}:
            value = metrics[name]
            assert three[step][name] == pytest.approx(value, rel=1e-12), (step, name)
            if step in rest:
                assert rest[step][name] == pytest.approx(value, rel=1e-12), (step, name)


def test_they_are_looked_at_without_drop_path(run_job: RunJob, split: Path, tmp_path: Path) -> None:
    """At the first step's learning rate of 0 all weights are as they began, however many rows were dropped."""
    config, found = {**CONFIG, "steps": 2, "validate_every": 1}, []
    for drop_path in (0.0, 0.3):
        recipe = {**RECIPE, "drop_path": drop_path}
        work = tmp_path / f"drop-{drop_path}"
        done = run_job(work, 1, config=config, recipe=recipe, index=split)
        found.append((done["losses"][1], done["held_out"][1]["loss"]))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("world", [1, 3])
def test_one_that_cannot_be_read_is_told_and_counts(
    run_job: RunJob, split: Path, tmp_path: Path, world: int
) -> None:
    whole, folder = ImageIndex.load(split), tmp_path / "lost"
    folder.mkdir()
    lost = HELD_OUT[2]
    rows = [whole[number] for number in range(len(whole))]
    rows[lost] = replace(rows[lost], path="gone.png")
    ImageIndex(rows).save(folder)
    config = {**CONFIG, "validate_every": 2, "max_unreadable": 1.0}
    common = {"config": config, "index": folder, "spikes": {}}
    done = run_job(tmp_path / "one", world, max_unreadable=1, **common)
    assert all(metrics["replaced_photos"] > 0 for metrics in done["held_out"].values())
    assert not any("replaced_photos" in metrics for _, metrics in done["metrics"])
    text = (tmp_path / "one" / f"checkpoints/step-{STEPS:08d}/checkpoint.json").read_text()
    assert json.loads(text)["unreadable"] == [lost]
    if world == 1:
        (trouble,) = done["troubles"]
        assert "gone.png" in trouble
    ended = run_job(tmp_path / "none", world, max_unreadable=0, **common)
    assert "1 photos could not be read since the stage began" in ended["error"]
    assert [step for step, _ in ended["metrics"]] == [1], "the first look is after step 2"


def test_the_seconds_of_a_look_are_not_those_of_a_step(run_job: RunJob, split: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "steps": 2, "validate_every": 2}
    done = run_job(tmp_path, 1, config=config, index=split, slow_look=True)
    assert [metrics["step_seconds"] for _, metrics in done["metrics"]] == [0.0, 0.0]
    assert [metrics["seconds"] for metrics in done["held_out"].values()] == [4 * LOOK_S], "of four blocks"


def test_their_figures_are_curves_of_their_own(tmp_path: Path) -> None:
    """In MLflow `val/loss` beside `train/loss`."""
    events: list[dict[str, Any]] = []
    monitor = RunMonitor("pretrain", 10, tmp_path / "goodput.json", events.append)
    monitor.begin()
    monitor.group_started(1)
    trained, held_out = {"loss": 6.0, "step_seconds": 0.1}, {"loss": 7.0, "ibot": 3.0}
    for step, looked in ((1, {}), (2, held_out)):
        monitor.stepped({"step": step, "metrics": trained, "stall": 0.0, "held_out": looked})
    found = [
        (event["channel"], event["step"], event["values"]) for event in events if event["kind"] == "metrics"
    ]
    assert [one for one in found if one[0] == "train"] == [("train", 1, trained), ("train", 2, trained)]
