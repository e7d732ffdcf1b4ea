"""Stop a pretraining on real photographs at 2 workers and go on at 1, or at 2: the curve is the undisturbed one.

Everything is real: the command line, Ray, DeepSpeed ZeRO-3, the food photographs. `make proofs` runs it.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

STEPS = 44
PIPELINE = {
    "name": "proof",
    "elastic": {"workers": 2, "checkpoint_every_s": 3},
    "data": {"photos": {"path": "food", "captions": "food/captions.csv"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 8, "sample": 0.3},
        "pretrain": {
            "kind": "pretrain", "needs": "curate", "model": "vit_pico", "drop_path": 0.2, "steps": STEPS,
            "heads": {"prototype_std": 0.125}, "batch_size": 24, "block_size": 8, "homogeneous": "photos",
            "crops": {"global_size": 64, "local_size": 32, "num_local": 2, "blur_sigma": [0.1, 0.6]},
            "optimizer": {"lr": {"peak": 2e-3, "warmup_steps": 6}}, "ema": {"peak": 0.95},
        },
    },
}  # fmt: skip


def run(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator", "run", "pipeline.yaml", *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=(folder / "log").open("ab"), stderr=subprocess.STDOUT)


def losses(folder: Path) -> dict[int, float]:
    (history,) = folder.glob("runs/artifacts/pretrain-*/history.json")
    records = json.loads(history.read_text())
    assert len(records) == STEPS, "a step is recorded once"
    return {record["step"]: record["metrics"]["loss"] for record in records}


def disturb(folder: Path, with_signal: signal.Signals) -> int:
    """Runs until a checkpoint past step 10 is there, sends the signal, and returns the exit code."""
    driver = run(folder)
    deadline = time.monotonic() + 300
    while not any(int(path.parent.name[5:]) > 10 for path in folder.rglob("step-*/checkpoint.json")):
        assert time.monotonic() < deadline
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)
    driver.send_signal(with_signal)
    return driver.wait(timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_curve_is_the_undisturbed_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: tmp_path / name for name in ("undisturbed", "stopped", "killed")}
    subprocess.run(
        [sys.executable, "-m", "orchestrator.data.samples", "food", str(tmp_path / "food")], check=True
    )
    for folder in folders.values():
        folder.mkdir()
        shutil.copytree(tmp_path / "food", folder / "food")
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE))
    assert run(folders["undisturbed"]).wait(timeout=600) == 0
    whole = losses(folders["undisturbed"])

    assert disturb(folders["stopped"], signal.SIGINT) == 130
    assert run(folders["stopped"], "elastic.workers=1").wait(timeout=600) == 0
    moved = losses(folders["stopped"])
    worst = max(abs(moved[step] - whole[step]) / abs(whole[step]) for step in whole)

    assert disturb(folders["killed"], signal.SIGKILL) == -signal.SIGKILL
    assert run(folders["killed"]).wait(timeout=600) == 0
    again = losses(folders["killed"])
    with capsys.disabled():
        print(f"\n2 workers, then 1: largest relative difference of {STEPS} losses {worst:.1e} (asked: 1e-4)")  # noqa: T201
        print(f"2 workers, killed, 2 workers: identical {again == whole}")  # noqa: T201
    assert worst < 1e-4
    assert again == whole
