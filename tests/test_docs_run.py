"""The commands of the pages run, one after the other, on the sample pipeline in small: what a reader would type."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pages import HAND_WRITTEN, ROOT, SAMPLE, typed
from PIL import Image
from test_docs_commands import is_cheap

# In this order: what a page shows may need what an earlier one made.
_PAGES = (
    "README.md",
    "docs/use-models.md",
    "docs/evaluate.md",
    "docs/mlflow.md",
    "docs/publishing.md",
    "docs/keys.md",
    "docs/formats.md",
    "docs/traces.md",
    "docs/tutorial.md",
)
# What cannot run here, and the test that runs it instead.
_ELSEWHERE = {
    "http://mlflow:5000": "tests/tracking/test_server.py",  # a server
    "--to": "tests/stages/test_gate.py",  # a third version
    "s3://BUCKET/store": "tests/pipeline/test_s3.py",
    "--devices": "tests/pipeline/test_device_split.py",  # minutes of measuring
    "timm": "tests/inference/test_pull_formats.py",  # a torchvision that fits torch
}
# Its pipeline.yaml is another one here; README's line writes another file.
_WRITES_THE_PIPELINE = ["orchestrator", "init", "data/food"]
_CROPS = {"global_size": 32, "local_size": 16, "num_local": 2}
_SMALL: dict[str, dict[str, Any]] = {
    "curate": {"clusters": 4, "sample": 0.5},
    "pretrain": {
        "model": "vit_femto", "steps": 3, "batch_size": 16, "block_size": 8, "crops": _CROPS, "snapshot_every": 1,
        "heads": {"hidden": 32, "dino_bottleneck": 16, "dino_prototypes": 64, "ibot_bottleneck": 16,
                  "ibot_prototypes": 64},
        "optimizer": {"lr": {"peak": 2.0e-3}}, "teacher_temperature": {"peak": 0.07}, "frozen_prototype_steps": 0,
    },
    "gram": {
        "steps": 2, "batch_size": 16, "block_size": 8, "crops": {**_CROPS, "gram_size": 64},
        "local_weight": {"peak": 0.5}, "gram": {"weight": {"peak": 2.0}, "teacher": 2},
    },
    "high_res": {
        "steps": 2, "batch_size": 16, "crops": {"num_local": 2}, "optimizer": {"lr": {"peak": 3.0e-4}},
        "resolutions": [{"global_size": 48, "local_size": 16, "gram_size": 64, "p": 1.0}],
    },
    "distill": {
        "steps": 2, "batch_size": 16, "block_size": 8, "crops": _CROPS, "optimizer": {"lr": {"peak": 2.0e-3}},
        "students": {"vit-nano": {"model": "vit_femto"}, "convnext-mini": {"model": "convnext_mini"}},
    },
    "align_text": {
        "steps": 2, "batch_size": 16, "block_size": 8, "image_size": 32, "optimizer": {"lr": {"peak": 1.0e-3}},
        "text": {"dim": 32, "depth": 1, "num_heads": 2},
    },
    "evaluate": {"num_pictures": 2},
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with conf/, photos under the names of the sample set, and the sample pipeline with a few steps."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    whole = yaml.safe_load((ROOT / SAMPLE).read_text())
    for name, settings in _SMALL.items():
        whole["stages"][name] |= settings
    for file in (SAMPLE, "pipeline.yaml"):
        (tmp_path / file).write_text(yaml.safe_dump(whole, sort_keys=False))
    photos = tmp_path / "data" / "food"
    photos.mkdir(parents=True)
    rows = ["file,caption,label"]
    for number in range(1, 49):
        pixels = np.random.default_rng(number).integers(0, 256, (72, 80, 3), dtype=np.uint8)
        pixels[..., number % 3] //= 2
        Image.fromarray(pixels).save(photos / f"A{number:03}.jpeg")
        rows.append(f"A{number:03}.jpeg,noise {number},kind {number % 3}")
    (photos / "captions.csv").write_text("\n".join(rows) + "\n")
    shutil.copy(photos / "A003.jpeg", tmp_path / "photo.jpg")
    return tmp_path


def lines() -> list[tuple[str, list[str]]]:
    """Each page and command line of a block that can run in the workplace; a line that several pages have, once."""
    found = [("README.md", ["orchestrator", "run", SAMPLE])]
    for page in _PAGES:
        for words in typed(ROOT / page, "orchestrator "):
            line = [word for word in words if word != "&"]
            if not runs_elsewhere(line) and line not in [other for _, other in found]:
                found.append((page, line))
    return found


def runs_elsewhere(line: list[str]) -> bool:
    """Whether another test runs what a line shows."""
    marked = any(mark in (word, word.partition("=")[2]) for word in line for mark in _ELSEWHERE)
    return marked or line == _WRITES_THE_PIPELINE


def as_typed(words: list[str], folder: Path) -> list[str]:
    """The arguments after the shell's work: FILE stands for the sample, 0123 for a key, `*` for any text."""
    arguments: list[str] = []
    for word in words[1:]:
        word = (SAMPLE if word == "FILE" else word).replace("-0123", "-*")
        found = sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]
        arguments += found[:1] if "-0123" in "".join(words) else found
    return arguments


def test_what_runs_elsewhere_has_a_test() -> None:
    assert all((ROOT / test).is_file() for test in _ELSEWHERE.values())
    assert len(lines()) >= 40


def test_each_command_of_the_pages_runs_in_a_test() -> None:
    run = [line for _, line in lines()]
    for page in HAND_WRITTEN:
        for words in typed(page, "orchestrator "):
            line = [word for word in words if word != "&"]
            assert is_cheap(line) or runs_elsewhere(line) or line in run, f"{page.name}: {' '.join(line)}"


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_the_commands_of_the_pages_run(workplace: Path) -> None:
    """Each ends with 0, and the names that they share (models, stages, files) are those of the sample pipeline."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "ORCHESTRATOR_CACHE": str(workplace / "cache")}
    commands = lines()
    for page, words in commands:
        if words[1] == "pull":
            # Pages pull into one folder, and a reader removes the one before.
            shutil.rmtree(workplace / words[words.index("--out") + 1], ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *as_typed(words, workplace)],
            cwd=workplace,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{page}: {' '.join(words)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
