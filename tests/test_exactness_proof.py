"""The promise: machines taken and given back at any moment, and the model that comes out is the same.

Five training stages on real photographs, on a real cluster whose machines are killed, drained and added while they
train: worker counts go 2 → 1 → 3 → 2 in each. Losses, sample orders and final weights are compared with those of an
undisturbed run, and those of a run at an unchanged count, killed in each stage, bit for bit. Weights that the one run
shards with ZeRO-3 are whole in every worker of the others. `make proofs` runs it, and leaves the curves as a picture
where `PROOF_PICTURE` says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from orchestrator.tracking.spool import Spool
from tools.market import SpotMarket

# A machine that is added takes seconds to warm up: some 50 steps of a student, or of a stage that is not sharded.
STEPS = {"pretrain": 80, "gram": 240, "high_res": 240, "distill/vit": 240, "align_text": 240}
TRAINING = tuple(STEPS)
# Of the disturbed runs; the undisturbed one has 3 for 0 and 0 for 3.
ZERO_STAGES = {"pretrain": 3, "gram": 0, "high_res": 0, "distill.students.vit": 3, "align_text": 0}
HEADS = {"hidden": 64, "dino_prototypes": 256, "ibot_prototypes": 256, "prototype_std": 0.125}
CROPS = {"global_size": 32, "local_size": 16, "num_local": 2, "blur_sigma": [0.1, 0.6]}
COMMON: dict[str, Any] = {"steps": 80, "batch_size": 20, "block_size": 4}
SSL: dict[str, Any] = {
    **COMMON,
    "crops": CROPS,
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 6}},
    "ema": {"peak": 0.95},
}
PIPELINE: dict[str, Any] = {
    "name": "proof",
    "elastic": {"workers": [1, 3], "checkpoint_every_s": 2, "resize_share": 1.0, "exact": True},
    "data": {"photos": {"path": "food", "captions": "food/captions.csv"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 8, "sample": 0.3},
        "pretrain": {
            **SSL, "kind": "pretrain", "needs": "curate", "model": "vit_femto", "drop_path": 0.2, "heads": HEADS,
            "homogeneous": "photos", "snapshot_every": 40,
        },
        "gram": {
            **SSL, "kind": "gram_anchor", "needs": ["curate", "pretrain"], "crops": {**CROPS, "gram_size": 64},
            "steps": STEPS["gram"],
            "gram": {"teacher": 40, "first_update": 30, "update_every": 40},
        },
        "high_res": {
            **SSL, "kind": "high_res", "needs": ["curate", "gram"], "steps": STEPS["high_res"],
            "crops": {"num_local": 2, "blur_sigma": [0.1, 0.6]},
            "resolutions": [
                {"global_size": 32, "local_size": 16, "gram_size": 48, "p": 0.5},
                {"global_size": 48, "local_size": 24, "gram_size": 64, "p": 0.5},
            ],
        },
        "distill": {
            **SSL, "kind": "distill", "needs": ["curate", "high_res"], "steps": STEPS["distill/vit"],
            "students": {"vit": {"model": "vit_femto", "workers": [1, 3]}},
        },
        "align_text": {
            **COMMON, "kind": "align_text", "needs": ["curate", "distill"], "student": "vit", "image_size": 32,
            "steps": STEPS["align_text"],
            "text": {"dim": 32, "depth": 2, "num_heads": 2}, "optimizer": {"lr": {"peak": 1e-3}},
        },
    },
}  # fmt: skip


@dataclass
class Watched:
    """A driver in a process of its own, and what its spool says about it."""

    folder: Path
    address: str
    overrides: tuple[str, ...] = ()
    driver: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        command = [
            sys.executable,
            "-m",
            "orchestrator",
            "run",
            "pipeline.yaml",
            f"cluster.address={self.address}",
        ]
        log = (self.folder / "log").open("ab")
        self.driver = subprocess.Popen([*command, *self.overrides], cwd=self.folder, stdout=log, stderr=log)

    def records(self, name: str, channel: str) -> list[dict[str, Any]]:
        spool = Spool(self.folder / "runs" / "spool" / "proof")
        for run_id in spool.run_ids():
            if any(record.get("name") == name for record, _ in spool.read(run_id)):
                return spool.history(run_id, channel)
        return []

    def step(self, name: str) -> int:
        return max((int(record["step"]) for record in self.records(name, "train")), default=0)

    def workers(self, name: str) -> list[int]:
        """How many workers trained, in order, without repetition."""
        counts = [int(record["metrics"]["workers"]) for record in self.records(name, "goodput")]
        counts = [count for count in counts if count]
        return [count for index, count in enumerate(counts) if index == 0 or counts[index - 1] != count]

    def until(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
            assert self.driver.poll() in (None, 0), (self.folder / "log").read_text()[-3000:]
            time.sleep(0.1)


class Conductor:
    """Takes and gives machines; adding is done by the main thread, as Ray's cluster wants it."""

    def __init__(self, market: SpotMarket) -> None:
        self.market = market
        self.wanted: list[str] = []
        self.made = 0

    def serve(self) -> None:
        while self.wanted:
            self.market.add(self.wanted.pop(0))

    def ask(self, number: int) -> None:
        for _ in range(number):
            self.made += 1
            self.wanted.append(f"m{self.made}")

    def disturb(self, run: Watched, name: str) -> None:
        """2 → 1 by a kill, → 3 by growth, → 2 by a drain."""
        run.until(lambda: run.step(name) >= 8)
        self.market.kill(list(self.market.machines)[-1])
        self.ask(2)
        run.until(lambda: 3 in run.workers(name) or run.step(name) >= STEPS[name])
        at = run.step(name)
        run.until(lambda: run.step(name) >= min(at + 4, STEPS[name]))
        going = next(iter(self.market.machines))
        self.market.drain(going, 30)
        run.until(lambda: run.step(name) >= min(at + 20, STEPS[name]))
        self.market.kill(going)
        run.until(lambda: run.step(name) >= STEPS[name])


def prepare(folder: Path, food: Path) -> Path:
    folder.mkdir()
    (folder / "food").symlink_to(food)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    return folder


def outcome(folder: Path, name: str) -> tuple[dict[int, dict[str, float]], dict[str, Any]]:
    """Figures by step, and the final master weights, of a training stage."""
    stage, _, student = name.partition("/")
    kind = PIPELINE["stages"][stage]["kind"]
    (artifact,) = folder.glob(f"runs/artifacts/{kind}-*")
    base = artifact
    if student:
        key = json.loads((artifact / "students" / student / "artifact.json").read_text())["key"]
        base = folder / "runs" / "artifacts" / f"student-{key[:16]}"
    history = json.loads((base / "history.json").read_text())
    weights: dict[str, list[Any]] = {}
    for file in sorted((base / "checkpoint").rglob("*.safetensors")):
        for key, value in load_file(file).items():
            weights.setdefault(key, []).append(value)
    assert len(history) == STEPS[name], name
    return (
        {record["step"]: record["metrics"] for record in history},
        {key: np.concatenate(parts) for key, parts in weights.items()},
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_a_spot_market_does_changes_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    food = tmp_path / "food"
    subprocess.run([sys.executable, "-m", "orchestrator.data.samples", "food", str(food)], check=True)
    calm, storm, killed = (prepare(tmp_path / name, food) for name in ("calm", "storm", "killed"))
    with SpotMarket() as market:
        market.add("a")
        market.add("b")
        two = ("elastic.workers=2", "stages.distill.students.vit.workers=2")
        disturbed = tuple(f"stages.{place}.zero_stage={stage}" for place, stage in ZERO_STAGES.items())
        calm_stages = tuple(f"stages.{place}.zero_stage={3 - stage}" for place, stage in ZERO_STAGES.items())
        run = Watched(calm, market.address, (*two, *calm_stages))
        run.until(lambda: run.driver.poll() == 0, 900)
        hit = Watched(killed, market.address, (*two, *disturbed))
        for name in TRAINING:
            hit.until(lambda name=name: hit.step(name) >= 30)  # type: ignore[misc]
            market.workers()[0].kill()
        hit.until(lambda: hit.driver.poll() == 0, 900)
        conductor = Conductor(market)
        stormy = Watched(storm, market.address, disturbed)
        errors: list[BaseException] = []

        def disturb() -> None:
            try:
                for name in TRAINING:
                    conductor.disturb(stormy, name)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=disturb, daemon=True)
        thread.start()
        while thread.is_alive():
            conductor.serve()
            thread.join(0.2)
        if errors:
            raise errors[0]
        stormy.until(lambda: stormy.driver.poll() == 0, 900)
        counts = {name: stormy.workers(name) for name in TRAINING}
    report = []
    for name in TRAINING:
        report.append(compare(calm, storm, killed, name, counts[name]))
    with capsys.disabled():
        print("\n" + "\n".join(report))  # noqa: T201
    if picture := os.environ.get("PROOF_PICTURE"):
        draw(calm, storm, Path(picture))
    shutil.rmtree(tmp_path, ignore_errors=True)


def compare(calm: Path, storm: Path, killed: Path, name: str, counts: list[int]) -> str:
    whole, weights = outcome(calm, name)
    moved, moved_weights = outcome(storm, name)
    again, again_weights = outcome(killed, name)
    assert all(moved[step]["sample_order"] == whole[step]["sample_order"] for step in whole), name
    loss = max(abs(moved[step]["loss"] - whole[step]["loss"]) / abs(whole[step]["loss"]) for step in whole)
    assert len(set(counts)) >= 3, f"{name}: {counts}"
    assert loss <= 1e-13, name
    assert weights.keys() == moved_weights.keys()
    for key, value in weights.items():
        assert np.array_equal(value, moved_weights[key]), f"{name}: {key} differs after changes of the count"
    same = all(again[step]["loss"] == whole[step]["loss"] for step in whole)
    assert same, name
    assert weights.keys() == again_weights.keys()
    for key, value in weights.items():
        assert np.array_equal(value, again_weights[key]), (
            f"{name}: {key} differs after a kill at an unchanged count"
        )
    return f"{name}: workers {counts}, losses within {loss:.1e}, weights identical; killed at 2: identical"


def draw(calm: Path, storm: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(TRAINING), figsize=(4 * len(TRAINING), 3), layout="constrained")
    for axis, name in zip(axes, TRAINING, strict=True):
        for folder, style, label in ((calm, "-", "undisturbed"), (storm, "--", "2 → 1 → 3 → 2 workers")):
            figures, _ = outcome(folder, name)
            axis.plot(list(figures), [f["loss"] for f in figures.values()], style, label=label, linewidth=1.5)
        axis.set_title(name)
        axis.set_xlabel("step")
    axes[0].set_ylabel("loss")
    axes[0].legend()
    figure.savefig(picture, dpi=130)
