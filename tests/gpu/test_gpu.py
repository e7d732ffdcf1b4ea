"""The same promises on a real GPU: `make gpu` runs these. Any other test sees no GPU.

What `tests/elastic/test_device.py` checks on GPUs that only Ray believes in happens here with CUDA, NCCL and bf16.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file

from orchestrator.tracking.spool import Spool

pytestmark = [
    pytest.mark.skipif(not torch.cuda.device_count(), reason="no GPU that torch can use"),
    pytest.mark.timeout(600),
]

STEPS = 30
SIZES = {"global_size": 64, "local_size": 32, "num_local": 2, "blur_sigma": [0.1, 0.6]}
SSL: dict[str, Any] = {
    "steps": STEPS, "batch_size": 32, "block_size": 8, "crops": SIZES,
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 6}}, "ema": {"peak": 0.95},
}  # fmt: skip
PIPELINE: dict[str, Any] = {
    "name": "gpu",
    "elastic": {"workers": "auto", "device": "gpu", "checkpoint_every_s": 2, "exact": True},
    "data": {"photos": {"path": "photos"}},
    "stages": {
        "curate": {"kind": "curate", "data": "photos", "clusters": 8, "sample": 0.3},
        "pretrain": {
            **SSL, "kind": "pretrain", "needs": "curate", "model": "vit_pico", "drop_path": 0.2,
            "heads": {"prototype_std": 0.125}, "snapshot_every": 15,
        },
        "gram": {
            **SSL, "kind": "gram_anchor", "needs": ["curate", "pretrain"], "crops": {**SIZES, "gram_size": 128},
            "gram": {"teacher": 15, "first_update": 10, "update_every": 10},
        },
        "distill": {
            **SSL, "kind": "distill", "needs": ["curate", "gram"],
            "students": {"vit": {"model": "vit_femto"}, "convnext": {"model": "convnext_mini"}},
        },
        "evaluate": {"kind": "evaluate", "needs": ["curate", "pretrain", "gram", "distill"]},
        "publish": {"kind": "publish", "needs": "distill", "alias": "champion"},
    },
}  # fmt: skip
TRAINING = ("pretrain", "gram", "distill/vit", "distill/convnext")


@pytest.fixture(scope="module", autouse=True)
def no_driver_stays() -> Iterator[None]:
    """A test that failed leaves its driver running."""
    yield
    for driver in Driver.all:
        if driver.process.poll() is None:
            driver.process.terminate()
            driver.process.wait(60)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of random shapes: what is learnt from them does not matter here."""
    folder = tmp_path_factory.mktemp("pictures") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(192):
        small = rng.integers(0, 255, size=(6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    return folder


class Driver:
    """`orchestrator run` of `PIPELINE`, changed by `overrides`, in a folder of its own."""

    all: ClassVar[list[Driver]] = []

    def __init__(self, folder: Path, photos: Path, *overrides: str) -> None:
        self.all.append(self)
        self.folder, self.overrides = folder, overrides
        folder.mkdir(exist_ok=True)
        if not (folder / "photos").exists():
            (folder / "photos").symlink_to(photos)
            (folder / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "orchestrator", "run", "pipeline.yaml", *self.overrides]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 200.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()[-3000:]
            assert self.process.poll() is None, self.log()[-3000:]
            time.sleep(0.05)

    def finish(self, seconds: float = 240.0) -> None:
        assert self.process.wait(timeout=seconds) == 0, self.log()[-6000:]

    def step(self, name: str) -> int:
        """The last step that a training stage or student has told."""
        spool = Spool(self.folder / "runs" / "spool" / "gpu")
        for run_id in spool.run_ids():
            if any(record.get("name") == name for record, _ in spool.read(run_id)):
                return max((int(record["step"]) for record in spool.history(run_id, "train")), default=0)
        return 0

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "orchestrator.elastic.forkserver" in process.parent().cmdline():
                    found.append(process)
            except (psutil.Error, AttributeError):
                continue
        return found

    def trained(self, name: str) -> tuple[dict[int, float], dict[str, np.ndarray]]:
        """Loss by step, and the final master weights and moments, of a training stage or student."""
        stage, _, student = name.partition("/")
        kind = PIPELINE["stages"][stage]["kind"]
        (artifact,) = self.folder.glob(f"runs/artifacts/{kind}-*")
        if student:
            key = json.loads((artifact / "students" / student / "artifact.json").read_text())["key"]
            artifact = self.folder / "runs" / "artifacts" / f"student-{key[:16]}"
        history = json.loads((artifact / "history.json").read_text())
        parts: dict[str, list[np.ndarray]] = {}
        for file in sorted((artifact / "checkpoint").rglob("*.safetensors")):
            for key, value in load_file(file).items():
                parts.setdefault(key, []).append(value)
        weights = {key: np.concatenate(shards) for key, shards in parts.items()}
        return {record["step"]: record["metrics"]["loss"] for record in history}, weights


@pytest.fixture(scope="module")
def calm(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A whole pipeline on the GPU that nothing disturbed."""
    driver = Driver(tmp_path_factory.mktemp("calm"), photos)
    driver.finish()
    return driver


def test_a_whole_pipeline_runs_on_the_gpu(calm: Driver) -> None:
    for name in TRAINING:
        losses, _ = calm.trained(name)
        assert len(losses) == STEPS
        assert all(np.isfinite(list(losses.values()))), name
        assert losses[STEPS] < losses[1], name


def test_killed_and_stopped_on_the_gpu_the_same_model_comes_out(
    calm: Driver, photos: Path, tmp_path: Path
) -> None:
    """A worker is killed in pretraining, another one in distillation, and the driver is stopped in Gram anchoring."""
    hit = Driver(tmp_path / "hit", photos)
    hit.until(lambda: hit.step("pretrain") >= 10)
    hit.workers()[0].kill()
    hit.until(lambda: hit.step("gram") >= 10)
    hit.process.send_signal(signal.SIGINT)
    assert hit.process.wait(timeout=90) == 130, hit.log()[-3000:]
    hit.start()
    hit.until(lambda: hit.step("distill/vit") >= 10)
    hit.workers()[0].kill()
    hit.finish()
    for name in TRAINING:
        losses, weights = calm.trained(name)
        again, weights_again = hit.trained(name)
        differ = [step for step, loss in losses.items() if again[step] != loss]
        assert not differ, f"{name}: losses differ from step {differ[0]} on"
        assert weights.keys() == weights_again.keys()
        assert all(np.array_equal(value, weights_again[key]) for key, value in weights.items()), name


def test_device_cpu_leaves_the_gpu_alone(photos: Path, tmp_path: Path) -> None:
    """No process below the driver of a run with `device: cpu` opens the GPU, though each could see it."""
    driver = Driver(tmp_path / "cpu", photos, "elastic.device=cpu", "--until", "pretrain")
    opened: set[str] = set()
    while driver.process.poll() is None:
        for process in psutil.Process(driver.process.pid).children(recursive=True):
            with suppress(OSError, psutil.Error):
                files = [fd.readlink() for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
                if any(str(file).startswith("/dev/nvidia-uvm") for file in files):
                    opened.add(" ".join(process.cmdline()[:4]))
        time.sleep(0.3)
    driver.finish()
    assert not opened
    assert len(driver.trained("pretrain")[0]) == STEPS


def test_a_step_in_float32_on_the_gpu_is_the_step_of_a_cpu(
    calm: Driver, photos: Path, tmp_path: Path
) -> None:
    runs = {}
    for device in ("cpu", "gpu"):
        driver = Driver(
            tmp_path / device, photos, f"elastic.device={device}", "stages.pretrain.precision=fp32",
            "stages.pretrain.steps=12", "stages.pretrain.snapshot_every=6", "--until", "pretrain",
        )  # fmt: skip
        driver.finish()
        runs[device] = driver.trained("pretrain")[0]
    for step, loss in runs["cpu"].items():
        assert runs["gpu"][step] == pytest.approx(loss, rel=2e-4), step


def test_two_workers_of_one_group_on_one_gpu_are_refused(photos: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("more than one GPU")
    driver = Driver(
        tmp_path / "two", photos, "elastic.workers=2", "elastic.resources.gpu=0.5", "--until", "pretrain"
    )
    assert driver.process.wait(timeout=120) == 1
    assert "2 workers on shares of 1 GPU" in driver.log()
    assert "Traceback" not in driver.log()


def test_the_doctor_names_the_gpu() -> None:
    found = subprocess.run([sys.executable, "-m", "orchestrator", "doctor"], capture_output=True, text=True)
    assert torch.cuda.get_device_name(0).split()[-1] in found.stdout


def test_a_published_model_gives_the_same_features_on_either_device(calm: Driver) -> None:
    orchestrator = [sys.executable, "-m", "orchestrator"]
    subprocess.run([*orchestrator, "pull", "gpu-vit@champion", "--out", "vit"], cwd=calm.folder, check=True)
    code = (
        "import numpy, orchestrator\n"
        "model = orchestrator.load('vit')\n"
        "photos = ['photos/000.png', 'photos/001.png']\n"
        "on_cpu = orchestrator.embed(model, photos)\n"
        "model.module.to('cuda')\n"
        "numpy.save('features.npy', [on_cpu, orchestrator.embed(model, photos)])\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=calm.folder, check=True)
    on_cpu, on_gpu = np.load(calm.folder / "features.npy")
    assert np.linalg.norm(on_gpu - on_cpu) <= 1e-3 * np.linalg.norm(on_cpu)
