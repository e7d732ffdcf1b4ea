"""A user's mistake costs one clear message: where, what, the nearest right thing; exit code 2; nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import command_line

FILE = """\
name: mistakes
data:
  photos: {path: photos}
stages:
  curate: {kind: curate, data: photos, clusters: 2}
  pretrain:
    kind: pretrain
    needs: curate
    model: vit_femto
    steps: 2
    batch_size: 4
    block_size: 2
    crops: {global_size: 32, local_size: 16, num_local: 2}
    optimizer: {lr: {peak: 0.001}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{number}.png"), pixels)
    return tmp_path


def message(folder: Path, text: str, *arguments: str, own_process: bool = False) -> str:
    (folder / "pipeline.yaml").write_text(text)
    words = ["run", "pipeline.yaml", *arguments]
    if own_process:
        command = [sys.executable, "-m", "orchestrator", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        code, said = done.returncode, done.stdout + done.stderr
    else:
        code, said = command_line(*words, folder=folder, toy=False)
    assert code == 2, said
    assert "Traceback" not in said
    assert not list(folder.glob("runs/artifacts/*")), "nothing half-written"
    return said


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("    batch_size: 4", "    batchsize: 4", ["pipeline.yaml:11", "batchsize", "batch_size"]),
        ("kind: pretrain", "kind: pretrian", ["pipeline.yaml:7", "pretrian", "pretrain"]),
        ("    steps: 2", "    steps: two", ["pipeline.yaml:10", "steps", "two"]),
        ("needs: curate", "needs: [curate, pretrain]", ["cycle", "pretrain"]),
        ("needs: curate", "needs: curat", ["curat", "curate"]),
        ("model: vit_femto", "model: vit_fempto", ["pipeline.yaml:9", "vit_fempto", "vit_femto"]),
        ("    block_size: 2", "    block_size: 3", ["batch_size", "3"]),
        ("global_size: 32", "global_size: 33", ["33", "patch"]),
        ("path: photos", "path: fotos", ["fotos"]),
        ("data: photos,", "data: photo,", ["photo", "photos"]),
    ],
)
def test_mistakes_in_the_file(folder: Path, right: str, wrong: str, says: list[str]) -> None:
    assert FILE.count(right) == 1
    said = message(folder, FILE.replace(right, wrong))
    for word in says:
        assert word in said, said


def test_zero_workers(folder: Path) -> None:
    said = message(folder, FILE, "elastic.workers=0")
    assert "elastic.workers" in said
    assert "1" in said


def test_no_photos(folder: Path) -> None:
    for photo in (folder / "photos").iterdir():
        photo.unlink()
    assert "photos" in message(folder, FILE)


def test_unreadable_photos(folder: Path) -> None:
    for photo in (folder / "photos").iterdir():
        photo.write_bytes(b"\x89PNG not really")
    assert "read" in message(folder, FILE, own_process=True), "curation begins and finds out"


def test_missing_file(folder: Path) -> None:
    command = [sys.executable, "-m", "orchestrator", "run", "pipelin.yaml"]
    (folder / "pipeline.yaml").write_text(FILE)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pipelin.yaml" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
