"""Pictures and a teacher with heads, for tests that distil."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.stages.common.nets import HeadedBackbone

from .distilling import HEADS, photographs

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench._torchvision import mend_torchvision

mend_torchvision()  # before a test module imports transformers, which imports a torchvision if there is one


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return photographs(tmp_path, 20, (80, 60), "png", seed=1)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    net = HeadedBackbone("vit_femto", 0.0, HEADS)
    folder = tmp_path / "teacher" / "snapshots"
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "step-00000001.safetensors")
    return tmp_path / "teacher"
