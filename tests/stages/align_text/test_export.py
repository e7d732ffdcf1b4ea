"""What `align_text` leaves: towers that embed as they were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from orchestrator.stages.align_text.export import save_aligned
from orchestrator.stages.align_text.task import AlignTask
from orchestrator.stages.common.aligned import load_aligned

from .aligning import (
    BLOCK,
    CAPTIONS,
    Threads,
    blocks_of_step,
    new_task,
)


@pytest.fixture
def aligned(tower: Path, tokenizer: Path, tmp_path: Path) -> Callable[..., tuple[Path, AlignTask]]:
    def make(state: Mapping[str, Tensor] | None = None, **overrides: Any) -> tuple[Path, AlignTask]:
        task = new_task(tower, tokenizer, **overrides)
        net = task.modules.trainable.eval()
        save_file({**net.state_dict(), **(state or {})}, tmp_path / "export.safetensors")
        save_aligned(
            tmp_path / "export.safetensors",
            tmp_path / "aligned",
            task.config,
            tower,
            tokenizer,
            image_size=16,
        )
        return tmp_path / "aligned", task

    return make


@pytest.mark.parametrize("pool", ["cls_and_patches", "cls"])
@pytest.mark.parametrize("text", ["scratch", "encoder", "locked encoder"])
def test_aligned_towers_embed_as_they_were_trained(
    pool: str,
    text: str,
    aligned: Callable[..., tuple[Path, AlignTask]],
    tower: Path,
    tokenizer: Path,
    encoder: Path,
) -> None:
    settings = {} if text == "scratch" else {"from": encoder, "lock": text == "locked encoder"}
    overrides: dict[str, Any] = {"text": settings, "vocab_size": None} if settings else {}
    folder, task = aligned(pool=pool, **overrides)
    shutil.rmtree(encoder)
    loaded = load_aligned(folder)
    block = blocks_of_step(tokenizer)[0]
    with torch.no_grad():
        (target,) = task.targets([block], Threads(1).of(0))
        out = task.modules.trainable(target.features, target.texts)
    photos = list(block.tensors["images"].permute(0, 2, 3, 1).numpy())
    texts = [f"{CAPTIONS[row]} 0 {row}" for row in range(BLOCK)]
    np.testing.assert_allclose(loaded.embed_images(photos), normalize(out.images), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loaded.embed_texts(texts), normalize(out.texts), rtol=1e-4, atol=1e-6)
    assert loaded.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_published_image_side_is_trained_and_loaded_again(
    aligned: Callable[..., tuple[Path, AlignTask]], tokenizer: Path
) -> None:
    text = {"dim": 16, "depth": 1, "num_heads": 2, "init": "by_width"}
    folder, task = aligned(output_dim=96, projection="shared", ffn_hidden=64, qkv_bias=False, text=text)
    net = task.modules.trainable
    assert not [
        name for name, _ in net.named_parameters() if "q_bias" in name or name == "aligner.proj.weight"
    ]
    loaded = load_aligned(folder)
    block = blocks_of_step(tokenizer)[0]
    with torch.no_grad():
        (target,) = task.targets([block], Threads(1).of(0))
        out = net(target.features, target.texts)
    photos = list(block.tensors["images"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(loaded.embed_images(photos), normalize(out.images), rtol=1e-4, atol=1e-6)
    assert loaded.embed_texts(["rice"]).shape == (1, 96)


def test_folders_of_the_format_before_are_read(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    folder, _ = aligned()
    photo = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    now = load_aligned(folder).embed_images([photo])
    record = json.loads((folder / "config.json").read_text())
    for name in ("projection", "ffn_hidden", "qkv_bias"):
        del record[name]
    for name in ("qkv_bias", "init"):
        del record["text"]["shape"][name]
    (folder / "config.json").write_text(json.dumps({**record, "format": 2}))
    np.testing.assert_array_equal(load_aligned(folder).embed_images([photo]), now)


def test_names_are_the_mean_of_their_prompts(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    loaded = load_aligned(aligned()[0])
    templates = ["a photo of {}", "{} on a plate", "{}"]
    got = loaded.embed_names(["rice", "dal"], templates)
    for row, name in enumerate(("rice", "dal")):
        mean = loaded.embed_texts([template.replace("{}", name) for template in templates]).mean(0)
        np.testing.assert_allclose(got[row], mean / np.linalg.norm(mean), atol=1e-6)
    assert not np.allclose(got, loaded.embed_names(["rice", "dal"]), atol=1e-3)


def test_patches_and_cls_make_up_the_image(
    aligned: Callable[..., tuple[Path, AlignTask]], tokenizer: Path
) -> None:
    folder, task = aligned()
    features = task._features(blocks_of_step(tokenizer)[0])
    aligner = task.modules.trainable.aligner
    with torch.no_grad():
        patches = aligner.patches(features)
        without = aligner(features) - patches.mean(1)
        # What is left is CLS's part alone: the first half of the projection.
        first_half = torch.cat([aligner._tokens(features, None)[0], torch.zeros(BLOCK, 48)], dim=1)
        torch.testing.assert_close(without, aligner.proj(first_half), rtol=1e-4, atol=1e-5)
    photo = np.zeros((20, 30, 3), np.uint8)
    photo[:, 15:] = 255
    (small,), (large,) = (load_aligned(folder).embed_patches([photo], size) for size in (None, 32))
    assert (small.shape, large.shape) == ((2, 2, 12), (4, 4, 12))
    np.testing.assert_allclose(np.linalg.norm(large, axis=-1), 1, rtol=1e-5)
    # Left and right differ, above and below are the same but for their place.
    assert np.abs(large[0, 0] - large[0, 3]).max() > np.abs(large[0, 0] - large[3, 0]).max()


def test_embeddings_do_not_depend_on_the_batch(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    loaded = load_aligned(aligned()[0])
    texts = [f"{caption} {number}" for number in range(7) for caption in CAPTIONS]
    together = loaded.embed_texts(texts)
    assert together.shape == (42, 12)
    np.testing.assert_allclose(together[[40]], loaded.embed_texts([texts[40]]), atol=1e-6)
    assert loaded.embed_images([]).shape == (0, 12)


def test_a_scale_above_the_largest_is_not_exported(aligned: Callable[..., tuple[Path, AlignTask]]) -> None:
    folder, _ = aligned({"logit_scale": torch.tensor([9.0])})
    assert load_aligned(folder).logit_scale == 100.0


def test_unfinished_or_newer_folders_are_refused(
    aligned: Callable[..., tuple[Path, AlignTask]], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        load_aligned(tmp_path / "nothing")
    folder, _ = aligned()
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "format": 4}))
    with pytest.raises(ValueError, match="format 4"):
        load_aligned(folder)
