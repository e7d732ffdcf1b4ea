"""A tower, a tokenizer and a text encoder to align; one thread, so that sums are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.models import build, save_pretrained
from orchestrator.stages.align_text.captions import (
    train_tokenizer,
)

from .aligning import (
    CAPTIONS,
    make_encoder,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return tmp_path / "model"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(CAPTIONS, 300, 16, tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A small BERT folder, as transformers writes it."""
    return make_encoder(tmp_path / "encoder")
