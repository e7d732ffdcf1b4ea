from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError
from orchestrator.models import load_pretrained, normalise
from orchestrator.stages.align_text.captions import (
    caption_blocks,
    caption_order,
)
from orchestrator.stages.align_text.task import AlignTask, held_below
from orchestrator.stages.common.nets import block_generator
from orchestrator.stages.common.text_tokenizer import load_tokenizer
from orchestrator.training.task import BlockTensors, Losses

from .aligning import (
    NUM_BLOCKS,
    Threads,
    blocks_of_step,
    config,
    new_task,
)


def own(blocks: list[BlockTensors], rank: int, world: int) -> list[BlockTensors]:
    """The blocks of a worker as the training loop deals them, with its padding."""
    slots = -(-len(blocks) // world)
    mine = blocks[rank::world]
    filler = mine[0] if mine else blocks[0]
    return mine + [BlockTensors(0, filler.index, 0.0, filler.tensors)] * (slots - len(mine))


def run_workers(tasks: list[AlignTask], blocks: list[BlockTensors]) -> list[tuple[float, Losses]]:
    """(weight, losses) of every block of every worker."""
    world = len(tasks)
    threads = Threads(world)

    def work(rank: int) -> list[tuple[float, Losses]]:
        mine = own(blocks, rank, world)
        targets = tasks[rank].targets(mine, threads.of(rank))
        pairs = zip(mine, targets, strict=True)
        return [(block.weight / NUM_BLOCKS, tasks[rank].losses(block, target)) for block, target in pairs]

    with ThreadPoolExecutor(world) as pool:
        return [result for results in pool.map(work, range(world)) for result in results]


def whole_batch_loss(task: AlignTask, blocks: list[BlockTensors]) -> Tensor:
    """InfoNCE of all pairs at once, with gradients through the columns."""
    tower = load_pretrained(task.tower)
    outs = []
    for block in blocks:
        tokens, lengths = block.tensors["tokens"], block.tensors["lengths"]
        with torch.no_grad():
            features = tower(normalise(block.tensors["images"]))
            encoder = task.modules.frozen.get("encoder")
            texts = (tokens, lengths) if encoder is None else (encoder(tokens, lengths),)
        outs.append(task.modules.trainable(features, texts, block_generator(3, 0, block.index)))
    images, texts = (normalize(torch.cat([out[side] for out in outs])) for side in (0, 1))
    logits = outs[0].scale * images @ texts.T
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("text", ["scratch", "encoder", "locked encoder"])
def test_workers_add_up_to_the_gradient_of_the_whole_batch(
    world: int, text: str, tower: Path, tokenizer: Path, encoder: Path
) -> None:
    blocks = blocks_of_step(tokenizer)
    settings = {} if text == "scratch" else {"from": encoder, "lock": text == "locked encoder"}
    overrides: dict[str, Any] = {"text": settings, "vocab_size": None} if settings else {}
    reference = new_task(tower, tokenizer, **overrides)
    params = dict(reference.modules.trainable.named_parameters())
    assert ("text.encoder.token_embed.weight" in params) == (text == "encoder")
    expected_loss = whole_batch_loss(reference, blocks)
    expected = torch.autograd.grad(expected_loss, list(params.values()))

    tasks = [new_task(tower, tokenizer, **overrides) for _ in range(world)]
    results = run_workers(tasks, blocks)
    total = torch.zeros(())
    for weight, losses in results:
        total = total + weight * losses.total
    total.backward()

    torch.testing.assert_close(total.detach(), expected_loss.detach(), rtol=1e-5, atol=1e-6)
    for name, want in zip(params, expected, strict=True):
        got = sum(task.modules.trainable.get_parameter(name).grad for task in tasks)
        torch.testing.assert_close(
            got, want, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert want.abs().sum() > 0, name
    for task in tasks:
        assert all(
            param.grad is None for module in task.modules.frozen.values() for param in module.parameters()
        )


def test_figures_are_the_whole_batch_at_any_number_of_workers(tower: Path, tokenizer: Path) -> None:
    blocks = blocks_of_step(tokenizer)
    metrics = []
    for world in (1, 2):
        results = run_workers([new_task(tower, tokenizer) for _ in range(world)], blocks)
        names = results[0][1].metrics
        metrics.append(
            {name: sum(w * float(losses.metrics[name]) for w, losses in results) for name in names}
        )
    assert metrics[0] == pytest.approx(metrics[1])
    assert metrics[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)


def test_the_tower_runs_once_a_block_and_gets_no_gradient(tower: Path, tokenizer: Path) -> None:
    task, blocks = new_task(tower, tokenizer), blocks_of_step(tokenizer)
    calls = []
    task.modules.frozen["tower"].register_forward_hook(lambda *_: calls.append(1))
    for weight, losses in run_workers([task], blocks):
        (weight * losses.total).backward()
    assert len(calls) == NUM_BLOCKS
    assert all(param.grad is None for param in task.modules.frozen["tower"].parameters())


def test_the_scale_is_held_and_can_come_back() -> None:
    def step(start: float, sign: float) -> tuple[float, float]:
        x = torch.tensor(start, requires_grad=True)
        held = held_below(x, 4.0)
        (sign * held).backward()
        assert x.grad is not None
        return held.item(), x.grad.item()

    assert step(3.0, -1) == (3.0, -1.0)
    assert step(5.0, -1) == (4.0, 0.0)
    assert step(5.0, +1) == (4.0, 1.0)


# --- data ---------------------------------------------------------------------------------------------------


def photo_index(folder: Path, captions: list[str | None]) -> ImageIndex:
    rows = []
    for number, caption in enumerate(captions):
        name = f"{number}.png"
        cv2.imwrite(str(folder / name), np.full((20, 24, 3), 20 * number, np.uint8))
        component = "balanced" if number % 2 else "pool"
        rows.append(ImageRecord("photos", name, str(folder), "0", 24, 20, caption, None, component))
    index = ImageIndex(rows)
    index.save(folder)
    return index


def test_photos_without_a_caption_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    photo_index(tmp_path, ["rice", None, "wheat", "maize", " ", "dal"])
    both = config(batch_size=4, block_size=2, mix=["balanced", "pool"])
    blocks = caption_blocks(both, tmp_path, load_tokenizer(tokenizer), 16, 0)
    seen = {int(row) for step in range(3) for index in range(2) for row in blocks.load(step, index).ids}
    assert seen == {0, 2, 3, 5}


def test_too_few_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 3 photos has a caption"):
        caption_order(config(batch_size=2, block_size=2), photo_index(tmp_path, [None, "", " "]), 0)
    index = photo_index(tmp_path, ["a", "b", None, "d"])
    both = config(batch_size=4, block_size=2, mix=["balanced", "pool"])
    with pytest.raises(UserError, match="a batch of 4 pairs is more than the 3 photos") as caught:
        caption_order(both, index, 0)
    assert caught.value.hint == "use a batch_size of at most 3"
    # What curation left out is not drawn unless the mix names it; the message says that it could.
    with pytest.raises(UserError, match="a batch of 3 pairs is more than the 2 photos") as caught:
        caption_order(config(batch_size=3, block_size=3), index, 0)
    assert caught.value.hint == (
        "use a batch_size of at most 2, or a `mix` that takes in more of the 3 photos of the index that have one"
    )
