"""An index with labels, and a backbone to start from."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.models import (
    build,
    save_pretrained,
)
from orchestrator.stages.finetune.start import StartingBackbone

from .finetuning import LABELS


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """24 pictures in folders by label; the table says the labels too."""
    rng, rows = np.random.default_rng(0), []
    for number in range(24):
        label = LABELS[number % 3]
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        path = f"{label}/{number}.png"
        cv2.imwrite(str(tmp_path / "photos" / path), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        rows.append(
            ImageRecord("photos", path, str(tmp_path / "photos"), f"{number:064x}", 24, 20, label=label)
        )
    (tmp_path / "index").mkdir()
    ImageIndex(rows).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def start(tmp_path: Path) -> StartingBackbone:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "start", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return StartingBackbone(tmp_path / "start", 16)
