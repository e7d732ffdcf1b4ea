"""A small model with random weights, one with a text tower, and a folder of ordinary and odd photos."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from orchestrator.models import build, load_pretrained, save_pretrained

from .pictures import SIZE, huge_claim, pixels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's cache and nobody's registry."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def threads() -> Iterator[int]:
    """A number of torch's threads that the user has set."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a ViT."""
    torch.manual_seed(0)
    save_pretrained(tmp_path / "model", build("vit_femto").state_dict(), "vit_femto", {"image_size": SIZE})
    return tmp_path / "model"


@pytest.fixture
def aligned(model: Path, tmp_path: Path) -> Path:
    """The folder of the same ViT with a text tower."""
    from orchestrator.stages.align_text.captions import train_tokenizer
    from orchestrator.stages.align_text.config import AlignText, TextSettings
    from orchestrator.stages.align_text.export import save_aligned
    from orchestrator.stages.align_text.task import align_net
    from orchestrator.stages.common.text_tokenizer import load_tokenizer

    folder = tmp_path / "align_text"
    folder.mkdir()
    sizes = TextSettings(dim=16, depth=1, num_heads=2)
    config = AlignText(
        kind="align_text", steps=1, batch_size=16, output_dim=12, num_blocks=0, text=sizes, vocab_size=300
    )
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(["a dog", "a cat", "rice and peas"], config.vocab_size, config.context, tokenizer)
    torch.manual_seed(0)
    net = align_net(config, load_pretrained(model).dim, load_tokenizer(tokenizer).get_vocab_size(), None)
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(weights, folder / "export.safetensors")
    save_aligned(folder / "export.safetensors", folder / "aligned", config, model, tokenizer, image_size=SIZE)
    return folder / "aligned"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photos that differ in all that a decoder can differ in, and of what is none."""
    folder = tmp_path / "photos"
    (folder / "below" / "deeper").mkdir(parents=True)
    # Large enough that it is decoded at half its size.
    Image.fromarray(pixels(0, 120, 90)).save(folder / "large.jpg")
    Image.fromarray(pixels(1)).save(folder / "below" / "plain.png")
    Image.fromarray(pixels(2)).quantize(8).save(folder / "palette.png")
    Image.fromarray(pixels(3)[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(4)).save(folder / "below" / "deeper" / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([pixels(5), pixels(6)[..., :1]])).save(folder / "clear.png")
    Image.fromarray(pixels(7)).convert("CMYK").save(folder / "print.jpg")
    Image.fromarray(pixels(8)).save(folder / "tiny.gif")

    (folder / "broken.jpg").write_bytes((folder / "large.jpg").read_bytes()[:600])
    (folder / "empty.png").write_bytes(b"")
    (folder / "huge.png").write_bytes(huge_claim())
    (folder / "text.jpeg").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    os.mkfifo(folder / "pipe.jpg")
    return folder
