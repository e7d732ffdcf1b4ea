"""Pictures and a teacher with heads, for tests that distil."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from orchestrator.data.index import PhotoIndex, PhotoRow
from orchestrator.stages.tasks.nets import HeadedBackbone

from .distilling import HEADS


@pytest.fixture
def index(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    rows = []
    for number in range(20):
        pixels = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60))
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
        rows.append(PhotoRow("photos", f"{number}.png", str(tmp_path), "", 80, 60))
    (tmp_path / "index").mkdir()
    PhotoIndex(rows).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    net = HeadedBackbone("vit_femto", 0.0, HEADS)
    folder = tmp_path / "teacher" / "snapshots"
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "step-00000001.safetensors")
    return tmp_path / "teacher"
