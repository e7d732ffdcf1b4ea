"""A watcher's choice of the best checkpoint, and whole tensors out of workers' parts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Figure
from orchestrator.fsio import sha256_of
from orchestrator.pipeline.watch import CheckpointScore, WatchOptions, best_of, check_options, parsed
from orchestrator.training.checkpoint.format import FORMAT, CheckpointError, shard_name
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.checkpoint.whole import whole_tensors


def scores(name: str, *values: float) -> list[CheckpointScore]:
    return [
        CheckpointScore(10 * at, {name: Figure(value), "other/rmse": Figure(9.0 - at)})
        for at, value in enumerate(values)
    ]


def test_the_best_is_the_first_of_the_highest() -> None:
    found = scores("knn/accuracy", 0.2, 0.5, math.nan, 0.5, 0.4)
    best = best_of(found)
    assert (best.step, best.name, str(best)) == (10, "knn/accuracy", "step 10, knn/accuracy 0.500")
    assert best_of(found, "knn").step == 10
    assert best_of(found, "other/rmse").step == 40, "less of an error is better"
    assert best_of(found, "other").step == 40
    with pytest.raises(UserError, match="there is no figure 'knn/acuracy'") as caught:
        best_of(found, "knn/acuracy")
    assert caught.value.hint == "did you mean 'knn/accuracy'?"


def test_metrics_are_named_as_in_a_pipeline_file() -> None:
    assert [one.title for one in parsed(["knn", "image_retrieval"])] == ["knn", "image_retrieval"]
    with pytest.raises(UserError, match="linear_probe needs a split"):
        parsed(["linear_probe"])
    with pytest.raises(UserError, match="'linear_depth' cannot be used here"):
        parsed(["linear_depth"])
    with pytest.raises(UserError, match="'kn' cannot be used here"):
        parsed(["kn"])


def test_mistakes_in_options_are_told_before_anything_is_scored(tmp_path: Path) -> None:
    metrics = parsed(["knn"])
    for by in (None, "knn", "knn/accuracy"):
        check_options(WatchOptions(by=by, keep=tmp_path / "best"), metrics)
    with pytest.raises(UserError, match="there is no figure 'kn'") as caught:
        check_options(WatchOptions(by="kn"), metrics)
    assert caught.value.hint == "did you mean 'knn'?"
    for seconds in (math.nan, math.inf, 1e12):
        with pytest.raises(UserError, match="no time between two looks"):
            check_options(WatchOptions(every_s=seconds), metrics)
    with pytest.raises(UserError, match="is there, and no watcher wrote it"):
        check_options(WatchOptions(keep=tmp_path), metrics)
    (tmp_path / "watch.json").write_text("{}")
    check_options(WatchOptions(keep=tmp_path), metrics)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_workers_are_joined(tmp_path: Path, world: int) -> None:
    rng = np.random.default_rng(0)
    whole = {"ema/backbone.a": rng.random(10, np.float32), "ema/backbone.b": rng.random(2, np.float32)}
    whole["master/backbone.a"] = rng.random(10, np.float32)
    folder = tmp_path / "step-00000007"
    files = {}
    for rank in range(world):
        path = folder / shard_name("a0001", rank, world)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {}
        for name, values in whole.items():
            size = -(-len(values) // world)
            part = values[rank * size : (rank + 1) * size]
            if len(part):
                parts[name] = part
        save_file(parts, path)
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    record = {
        "format": FORMAT, "step": 7, "num_workers": world, "token": "a0001", "updates": 7, "files": files,
        "keys": {name: len(values) for name, values in whole.items()}, "meta": {}, "versions": {},
    }  # fmt: skip
    (folder / "checkpoint.json").write_text(json.dumps(record))
    storage = CheckpointStorage(tmp_path)
    found = whole_tensors(storage, storage.find(7), "ema/backbone.")
    assert found.keys() == {"a", "b"}
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole[f"ema/backbone.{name}"])
    record["keys"]["ema/backbone.b"] = 5
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"ema/backbone\.b has 2 of 5 elements"):
        whole_tensors(storage, storage.find(7), "ema/backbone.")
