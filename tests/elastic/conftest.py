"""Real multi-process jobs over gloo, without Ray: what the loop does must not depend on who started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from orchestrator.data.index import ImageIndex, ImageRecord

LAB = Path(__file__).with_name("lab.py")
HEADS = {
    "hidden": 32,
    "dino_bottleneck": 16,
    "dino_prototypes": 64,
    "ibot_bottleneck": 16,
    "ibot_prototypes": 64,
}
CONFIG: dict[str, Any] = {
    "kind": "pretrain",
    "model": "vit_femto",
    "drop_path": 0.3,
    "heads": HEADS,
    "steps": 6,
    "batch_size": 16,
    "block_size": 4,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 2}, "layer_decay": 0.8},
    "ema": {"peak": 0.9},
    "frozen_prototype_steps": 2,
    "koleo_views": "both",
    "mix": {"balanced": 0.75, "pool": 0.25},
    "homogeneous": "fine",
    "homogeneous_ratio": 0.3,
}
RECIPE = {"model": "vit_femto", "drop_path": 0.3, "heads": HEADS, "global_size": 32}

RunJob = Callable[..., dict[str, Any]]
Group = Callable[..., list[Any]]
DIED = -signal.SIGKILL


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 40 smooth random pictures of two sources, in two components."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        pixels = cv2.resize(
            rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC
        )
        cv2.imwrite(str(root / f"{number:02}.png"), pixels)
        source = "fine" if number % 3 == 0 else "photos"
        component = "balanced" if number % 2 else "pool"
        rows.append(ImageRecord(source, f"{number:02}.png", str(root), "", 80, 60, component=component))
    folder = tmp_path_factory.mktemp("index")
    ImageIndex(rows).save(folder)
    return folder


@pytest.fixture
def run_job(forge: subprocess.Popen[str], index: Path, tmp_path: Path) -> RunJob:
    """Runs a job on `world` worker processes to its end or a stop; returns {complete, losses, metrics}, or {error}."""

    def run(work: Path, world: int, **spec: Any) -> dict[str, Any]:
        scratch = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        merged = {**CONFIG, **spec.pop("config", {})}
        config = {key: value for key, value in merged.items() if value is not None}
        full = {
            "config": config, "recipe": RECIPE, "index": str(index), "work": str(work), **spec,
        }  # fmt: skip
        if full.get("die_at"):
            run_group(forge, scratch, "job", world, dies=True, **full)
            return {}
        result: dict[str, Any] = run_group(forge, scratch, "job", world, **full)[0]
        if "error" in result:
            return result
        result["losses"] = {step: metrics["loss"] for step, metrics in result["metrics"]}
        result["held_out"] = {int(step): metrics for step, metrics in result["held_out"].items()}
        return result

    return run


@pytest.fixture(scope="session")
def forge() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and forks groups of workers; see lab.py."""
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(LAB)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def group(forge: subprocess.Popen[str], tmp_path: Path) -> Group:
    """Runs `do` in `world` workers; their results, CheckpointErrors as `{"error": …}`."""
    numbers = iter(range(1000))

    def run(do: str, world: int, **spec: Any) -> list[Any]:
        return run_group(forge, tmp_path / f"group-{next(numbers)}", do, world, **spec)

    return run


def run_group(
    forge: subprocess.Popen[str], scratch: Path, do: str, world: int, *, dies: bool = False, **spec: Any
) -> list[Any]:
    scratch.mkdir()
    full = {"do": do, "world": world, "scratch": str(scratch), **spec}
    assert forge.stdin is not None
    assert forge.stdout is not None
    forge.stdin.write(json.dumps(full, default=str) + "\n")
    forge.stdin.flush()
    codes = json.loads(forge.stdout.readline())
    if dies:
        assert codes == [DIED] * world
        return []
    logs = [(scratch / f"log-{rank}").read_text()[-3000:] for rank in range(world)]
    assert codes == [0] * world, "\n".join(logs)
    found = [json.loads((scratch / f"result-{rank}").read_text()) for rank in range(world)]
    return [one.get("result", one) for one in found]
